"""Generated from proto/esper/tolaria/v1 by .ci/generate.sh; never edited."""
