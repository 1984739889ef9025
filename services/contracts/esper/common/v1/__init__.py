"""Generated from proto/esper/common/v1 by .ci/generate.sh; never edited."""
