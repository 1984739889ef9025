"""Generated from proto/esper/oona/v1 by .ci/generate.sh; never edited."""
