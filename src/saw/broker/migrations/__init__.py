"""Alembic steps of the broker's database, applied when the broker starts."""
