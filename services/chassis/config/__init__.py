"""Configuration: one typed tree (:mod:`.schema`), loaded in layers with every mistake named (:mod:`.loader`)."""
