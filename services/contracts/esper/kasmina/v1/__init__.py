"""Generated from proto/esper/kasmina/v1 by .ci/generate.sh; never edited."""
