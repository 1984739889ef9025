"""Generated from proto/esper by .ci/generate.sh; never edited."""
