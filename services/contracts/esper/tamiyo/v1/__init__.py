"""Generated from proto/esper/tamiyo/v1 by .ci/generate.sh; never edited."""
