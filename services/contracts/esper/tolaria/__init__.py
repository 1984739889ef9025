"""Generated from proto/esper/tolaria by .ci/generate.sh; never edited."""
