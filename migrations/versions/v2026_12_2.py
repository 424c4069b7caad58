"""The index of what can be claimed says so in words of its own, so that Postgres takes it for nothing else."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026.12.2"
down_revision = "2026.12.1"
branch_labels = None
depends_on = None

COLUMNS = ["needs", "alone", sa.text("priority DESC"), "rank", "seq"]


def upgrade() -> None:
    """Make it anew."""
    _replace("state = 'queued' AND waiting = 0")


def downgrade() -> None:
    """Go back."""
    _replace("state = 'queued'")


def _replace(condition: str) -> None:
    if op.get_context().dialect.name == "postgresql":
        op.drop_index("ix_tasks_queued_needs", "tasks")
        op.create_index("ix_tasks_queued_needs", "tasks", COLUMNS, postgresql_where=sa.text(condition))
