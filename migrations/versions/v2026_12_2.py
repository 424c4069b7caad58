"""Postgres keeps no statistics of states: taken while nothing is queued, they let a finish read the whole queue."""

from __future__ import annotations

from alembic import op

from orchestrator.db.estimates import drop_statistics, keep_statistics

revision = "2026.12.2"
down_revision = "2026.12.1"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop them."""
    _execute(drop_statistics())


def downgrade() -> None:
    """Let them be made again."""
    _execute(keep_statistics())


def _execute(statements: list[str]) -> None:
    if op.get_context().dialect.name == "postgresql":
        for statement in statements:
            op.execute(statement)
