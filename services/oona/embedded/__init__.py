"""The bus without a broker: a durable segmented log in the service's state folder."""
