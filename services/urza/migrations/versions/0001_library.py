"""Tables of blueprints, kernels, their tags and outcomes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "blueprints",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("family", sa.String(512), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("display_name", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("parent", sa.String(32), sa.ForeignKey("blueprints.id"), nullable=True, index=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("create_time", sa.BigInteger, nullable=False),
        sa.Column("archive_time", sa.BigInteger, nullable=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_blueprints_order", "blueprints", ["create_time", "id"])
    op.create_table(
        "blueprint_tags",
        sa.Column("tag", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(32), sa.ForeignKey("blueprints.id"), primary_key=True, index=True),
    )
    op.create_table(
        "kernels",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("blueprint", sa.String(32), sa.ForeignKey("blueprints.id"), nullable=False),
        sa.Column("family", sa.String(512), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("signature", sa.LargeBinary(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("interface", sa.Text, nullable=False),
        sa.Column("interface_signature", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("init_seed", sa.BigInteger, nullable=False),
        sa.Column("target", sa.String(512), nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("flops", sa.BigInteger, nullable=True),
        sa.Column("latency_seconds", sa.Float(53), nullable=True),
        sa.Column("latency_batch", sa.BigInteger, nullable=True),
        sa.Column("memory_bytes", sa.BigInteger, nullable=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("status_reason", sa.Text, nullable=False),
        sa.Column("create_time", sa.BigInteger, nullable=False),
        sa.Column("status_time", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_kernels_order", "kernels", ["create_time", "id"])
    op.create_index("ix_kernels_place", "kernels", ["blueprint", "interface_signature", "size", "target"])
    op.create_table(
        "kernel_tags",
        sa.Column("tag", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(32), sa.ForeignKey("kernels.id"), primary_key=True, index=True),
    )
    op.create_table(
        "kernel_outcomes",
        sa.Column("kernel", sa.String(32), sa.ForeignKey("kernels.id"), primary_key=True),
        sa.Column("seed", sa.String(512), primary_key=True),
        sa.Column("result", sa.String(16), nullable=False),
        sa.Column("contribution", sa.Float(53), nullable=True),
        sa.Column("contribution_low", sa.Float(53), nullable=True),
        sa.Column("contribution_high", sa.Float(53), nullable=True),
        sa.Column("contribution_confidence", sa.Float(53), nullable=True),
        sa.Column("contribution_samples", sa.BigInteger, nullable=True),
        sa.Column("time", sa.BigInteger, nullable=False),
    )
