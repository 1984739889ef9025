"""Generated from proto/esper/events by .ci/generate.sh; never edited."""
