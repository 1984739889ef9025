"""Steps of the library's schema, run by :mod:`services.urza.sql_metadata` when it opens a database."""
