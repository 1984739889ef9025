"""Generated from proto/esper/tamiyo by .ci/generate.sh; never edited."""
