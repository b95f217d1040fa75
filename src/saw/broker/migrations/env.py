"""Alembic's entry point: runs the steps on the connection that the broker hands over."""

from __future__ import annotations

from alembic import context

from saw.broker import schema

context.configure(connection=context.config.attributes["connection"], target_metadata=schema.metadata)
with context.begin_transaction():
    context.run_migrations()
