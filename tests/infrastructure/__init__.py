"""Real brokers and databases for the tests, started lazily and always stopped."""
