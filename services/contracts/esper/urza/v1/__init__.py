"""Generated from proto/esper/urza/v1 by .ci/generate.sh; never edited."""
