"""The language that Tezzeret, Urza and Kasmina share: what may be grafted, and how it travels.

All modules here but :mod:`services.blueprints.builder` are free of torch.
"""
