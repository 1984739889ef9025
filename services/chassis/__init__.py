"""What every service shares: configuration, server, channels, errors, telemetry, supervision."""
