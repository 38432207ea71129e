"""Alembic's entry: run the revisions on the connection, and in the transaction, that schema.py hands over."""

from alembic import context

from lockstep.registry.models import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
