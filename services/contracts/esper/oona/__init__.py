"""Generated from proto/esper/oona by .ci/generate.sh; never edited."""
