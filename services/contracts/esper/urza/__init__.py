"""Generated from proto/esper/urza by .ci/generate.sh; never edited."""
