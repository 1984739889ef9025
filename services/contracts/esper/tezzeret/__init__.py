"""Generated from proto/esper/tezzeret by .ci/generate.sh; never edited."""
