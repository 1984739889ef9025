"""The bus on Kafka topics."""
