"""Edges of the task graph hold the numbers of tasks, in place of their ids, which took most of the time to enqueue."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from orchestrator.db.reference_checks import Reference, create_checks, drop_checks

revision = "2026.12.1"
down_revision = "2026.12.0"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True)

OTHERS = (
    Reference("job_tasks", "job_id", "jobs"),
    Reference("job_tasks", "task_id", "tasks"),
    Reference("events", "job_id", "jobs"),
    Reference("events", "task_id", "tasks"),
)
BEFORE = (Reference("task_inputs", "task_id", "tasks"), Reference("task_inputs", "source_id", "tasks"), *OTHERS)
AFTER = (
    Reference("task_inputs", "task_seq", "tasks", "seq"),
    Reference("task_inputs", "source_seq", "tasks", "seq"),
    *OTHERS,
)


def upgrade() -> None:
    """Write the edges anew."""
    _replace(BEFORE, AFTER, sa.BigInteger())


def downgrade() -> None:
    """Go back; nothing is lost."""
    _replace(AFTER, BEFORE, sa.String(64))


def _replace(
    old: tuple[Reference, ...], new: tuple[Reference, ...], kind: sa.types.TypeEngine[int] | sa.String
) -> None:
    """Put a table of edges in place of the one with other references to tasks: the first two of each."""
    is_postgres = op.get_context().dialect.name == "postgresql"
    if is_postgres:
        for statement in drop_checks(old):
            op.execute(statement)
        op.execute("ALTER TABLE task_inputs DROP CONSTRAINT pk_task_inputs")
    (task, source), (old_task, old_source) = new[:2], old[:2]
    op.drop_index(f"ix_task_inputs_{old_source.column}", "task_inputs")
    op.rename_table("task_inputs", "task_inputs_before")
    foreign = [
        sa.ForeignKeyConstraint([each.column], [f"tasks.{each.key}"], name=op.f(f"fk_task_inputs_{each.column}"))
        for each in (source, task)
        if not is_postgres
    ]
    op.create_table(
        "task_inputs",
        sa.Column(task.column, kind, autoincrement=False, nullable=False),
        sa.Column(source.column, kind, autoincrement=False, nullable=False),
        sa.Column("places", JSON),
        *foreign,
        sa.PrimaryKeyConstraint(task.column, source.column, name=op.f("pk_task_inputs")),
    )
    op.execute(
        f"INSERT INTO task_inputs ({task.column}, {source.column}, places) "
        f"SELECT reader.{task.key}, source.{source.key}, edge.places FROM task_inputs_before AS edge "
        f"JOIN tasks AS reader ON reader.{old_task.key} = edge.{old_task.column} "
        f"JOIN tasks AS source ON source.{old_source.key} = edge.{old_source.column}"
    )
    op.drop_table("task_inputs_before")
    op.create_index(op.f(f"ix_task_inputs_{source.column}"), "task_inputs", [source.column])
    if is_postgres:
        for statement in create_checks(new):
            op.execute(statement)
