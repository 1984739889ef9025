"""Tables of the library, as of the newest migration. Times are microseconds since 1970, UTC."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

METADATA = MetaData()

HEAD = "0001"
"""Number of the newest migration, whose tables these are."""

VERSION = Table(
    "alembic_version",
    MetaData(),  # alembic's own table, not one of the library's
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)

BLUEPRINTS = Table(
    "blueprints",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("family", String(512), nullable=False),
    Column("spec", Text, nullable=False),
    Column("display_name", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("parent", String(32), ForeignKey("blueprints.id"), nullable=True, index=True),
    Column("state", String(16), nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("archive_time", BigInteger, nullable=True),
    Column("revision", BigInteger, nullable=False),
    Index("ix_blueprints_order", "create_time", "id"),
)

BLUEPRINT_TAGS = Table(
    "blueprint_tags",
    METADATA,
    Column("tag", String(64), primary_key=True),
    Column("owner", String(32), ForeignKey("blueprints.id"), primary_key=True, index=True),
)

KERNELS = Table(
    "kernels",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("blueprint", String(32), ForeignKey("blueprints.id"), nullable=False),
    Column("family", String(512), nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("signature", LargeBinary(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("interface", Text, nullable=False),
    Column("interface_signature", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("init_seed", BigInteger, nullable=False),
    Column("target", String(512), nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("flops", BigInteger, nullable=True),
    Column("latency_seconds", Float(53), nullable=True),
    Column("latency_batch", BigInteger, nullable=True),
    Column("memory_bytes", BigInteger, nullable=True),
    Column("status", String(16), nullable=False),
    Column("status_reason", Text, nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("status_time", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Index("ix_kernels_order", "create_time", "id"),
    Index("ix_kernels_place", "blueprint", "interface_signature", "size", "target"),
)

KERNEL_TAGS = Table(
    "kernel_tags",
    METADATA,
    Column("tag", String(64), primary_key=True),
    Column("owner", String(32), ForeignKey("kernels.id"), primary_key=True, index=True),
)

KERNEL_OUTCOMES = Table(
    "kernel_outcomes",
    METADATA,
    Column("kernel", String(32), ForeignKey("kernels.id"), primary_key=True),
    Column("seed", String(512), primary_key=True),
    Column("result", String(16), nullable=False),
    Column("contribution", Float(53), nullable=True),
    Column("contribution_low", Float(53), nullable=True),
    Column("contribution_high", Float(53), nullable=True),
    Column("contribution_confidence", Float(53), nullable=True),
    Column("contribution_samples", BigInteger, nullable=True),
    Column("time", BigInteger, nullable=False),
)
