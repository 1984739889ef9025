"""One test suite per port or service, run against each implementation."""
