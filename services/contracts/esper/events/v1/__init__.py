"""Generated from proto/esper/events/v1 by .ci/generate.sh; never edited."""
