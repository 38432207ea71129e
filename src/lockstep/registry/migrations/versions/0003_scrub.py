"""When a volume's mirrors are scrubbed: a weekly window in a time zone, or never."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the two columns; nothing is scrubbed before somebody says so."""
    op.add_column("volumes", sa.Column("scrub_window", sa.String(), nullable=True))
    op.add_column("volumes", sa.Column("scrub_timezone", sa.String(), nullable=True))
