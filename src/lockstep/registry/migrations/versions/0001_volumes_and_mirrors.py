"""Volumes and their mirrors."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "volumes",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("target_path", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sector_bytes", sa.Integer(), nullable=False),
        sa.Column("on_denied", sa.String(8), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_volumes")),
        sa.UniqueConstraint("name", name=op.f("uq_volumes_name")),
        sa.UniqueConstraint("target_path", name=op.f("uq_volumes_target_path")),
        sa.CheckConstraint("on_denied IN ('hold', 'refuse')", name=op.f("ck_volumes_on_denied")),
    )
    op.create_table(
        "mirrors",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("volume_id", sa.String(36), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("header_path", sa.String(), nullable=True),
        sa.Column("luks_uuid", sa.String(40), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_mirrors")),
        sa.ForeignKeyConstraint(["volume_id"], ["volumes.id"], name=op.f("fk_mirrors_volume_id"), ondelete="CASCADE"),
        sa.UniqueConstraint("path", name=op.f("uq_mirrors_path")),
        sa.UniqueConstraint("luks_uuid", name=op.f("uq_mirrors_luks_uuid")),
    )
    op.create_index(op.f("ix_mirrors_volume_id"), "mirrors", ["volume_id"])


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("mirrors")
    op.drop_table("volumes")
