"""Generated from proto/esper/kasmina by .ci/generate.sh; never edited."""
