"""Generated from proto/esper/tezzeret/v1 by .ci/generate.sh; never edited."""
