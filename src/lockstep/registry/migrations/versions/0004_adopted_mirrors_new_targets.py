"""Mirrors that may hold a copy already, and targets that are being filled from a mirror."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the two columns: no mirror was adopted before, and no target replaced."""
    op.add_column("mirrors", sa.Column("compare", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("volumes", sa.Column("filled_from", sa.String(36), nullable=True))


def downgrade() -> None:
    """Drop the two columns."""
    op.drop_column("volumes", "filled_from")
    op.drop_column("mirrors", "compare")
