"""Indexes of what can be claimed, and of leases, say so in words of their own: Postgres takes them for nothing else."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026.12.2"
down_revision = "2026.12.1"
branch_labels = None
depends_on = None

COLUMNS = ["needs", "alone", sa.text("priority DESC"), "rank", "seq"]


def upgrade() -> None:
    """Make them anew."""
    _replace("state = 'queued' AND waiting = 0", "state = 'running' AND lease_until IS NOT NULL")


def downgrade() -> None:
    """Go back."""
    _replace("state = 'queued'", "state = 'running'")


def _replace(queued: str, running: str) -> None:
    if op.get_context().dialect.name == "postgresql":
        op.drop_index("ix_tasks_queued_needs", "tasks")
        op.create_index("ix_tasks_queued_needs", "tasks", COLUMNS, postgresql_where=sa.text(queued))
        op.drop_index("ix_tasks_lease_until", "tasks")
        op.create_index("ix_tasks_lease_until", "tasks", ["lease_until"], postgresql_where=sa.text(running))
