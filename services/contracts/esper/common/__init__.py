"""Generated from proto/esper/common by .ci/generate.sh; never edited."""
