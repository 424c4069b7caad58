"""The first schema: models, jobs, tasks and their graph, results, events, releases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026.11.0"
down_revision = None
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True)
DOUBLE = sa.Float(precision=53)
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def where(condition: str) -> dict[str, sa.TextClause]:
    """Restrict an index to some rows, on both databases."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "kind_timings",
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("seconds", DOUBLE, nullable=False),
        sa.Column("work", DOUBLE, nullable=False),
        sa.PrimaryKeyConstraint("kind", "version", name=op.f("pk_kind_timings")),
    )
    op.create_table(
        "models",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("class_name", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("inspection", JSON, nullable=False),
        sa.Column("created_at", DOUBLE, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_models")),
    )
    op.create_index(op.f("ix_models_digest"), "models", ["digest"])
    op.create_table(
        "results",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("outputs", JSON, nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("seconds", DOUBLE, nullable=False),
        sa.Column("created_at", DOUBLE, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_results")),
    )
    op.create_table(
        "tasks",
        sa.Column("seq", SERIAL, sa.Identity(), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("params", JSON, nullable=False),
        sa.Column("inputs", JSON, nullable=False),
        sa.Column("cpus", DOUBLE, nullable=False),
        sa.Column("gpus", DOUBLE, nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("work", DOUBLE, nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("waiting", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(64)),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("not_before", DOUBLE, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("faults_task", sa.Integer(), nullable=False),
        sa.Column("faults_infrastructure", sa.Integer(), nullable=False),
        sa.Column("lease_token", sa.String(64)),
        sa.Column("lease_owner", sa.Text()),
        sa.Column("lease_until", DOUBLE),
        sa.Column("started_at", DOUBLE),
        sa.Column("finished_at", DOUBLE),
        sa.Column("error", sa.Text()),
        sa.CheckConstraint("(state = 'running') = (lease_owner IS NOT NULL)", name=op.f("ck_tasks_lease_owner")),
        sa.CheckConstraint("(state = 'running') = (lease_token IS NOT NULL)", name=op.f("ck_tasks_lease_token")),
        sa.CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name=op.f("ck_tasks_lease_until")),
        sa.CheckConstraint("state <> 'failed' OR error IS NOT NULL", name=op.f("ck_tasks_error")),
        sa.CheckConstraint(
            "state IN ('blocked', 'cancelled', 'failed', 'queued', 'running', 'succeeded')", name=op.f("ck_tasks_state")
        ),
        sa.CheckConstraint(
            "state NOT IN ('queued', 'running', 'succeeded') OR key IS NOT NULL", name=op.f("ck_tasks_key")
        ),
        sa.CheckConstraint(
            "state NOT IN ('queued', 'running', 'succeeded') OR waiting = 0", name=op.f("ck_tasks_ready")
        ),
        sa.CheckConstraint(
            "cpus >= 0 AND gpus >= 0 AND memory_bytes >= 0 AND work >= 0", name=op.f("ck_tasks_resources")
        ),
        sa.CheckConstraint(
            "waiting >= 0 AND attempt >= 0 AND faults_task >= 0 AND faults_infrastructure >= 0",
            name=op.f("ck_tasks_counts"),
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_tasks")),
        sa.UniqueConstraint("id", name=op.f("uq_tasks_id")),
    )
    op.create_index("ix_tasks_lease_until", "tasks", ["lease_until"], **where("state = 'running'"))
    op.create_index("ix_tasks_queued", "tasks", [sa.text("priority DESC"), "seq"], **where("state = 'queued'"))
    op.create_index(
        "ix_tasks_queued_cpu", "tasks", [sa.text("priority DESC"), "seq"], **where("state = 'queued' AND gpus = 0")
    )
    op.create_index("ix_tasks_queued_key", "tasks", ["key"], **where("state = 'queued'"))
    op.create_index("uq_tasks_running_key", "tasks", ["key"], unique=True, **where("state = 'running'"))
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(12), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("model_name", sa.String(128), nullable=False),
        sa.Column("model_digest", sa.String(64), nullable=False),
        sa.Column("recipe_name", sa.Text(), nullable=False),
        sa.Column("recipe_digest", sa.String(64), nullable=False),
        sa.Column("recipe", JSON, nullable=False),
        sa.Column("release_name", sa.String(128)),
        sa.Column("target_task", sa.String(64)),
        sa.Column("created_at", DOUBLE, nullable=False),
        sa.Column("started_at", DOUBLE),
        sa.Column("finished_at", DOUBLE),
        sa.Column("error", sa.Text()),
        sa.Column("release", sa.String(160)),
        sa.Column("digest", sa.String(64)),
        sa.Column("metrics", JSON),
        sa.CheckConstraint("(state IN ('queued', 'running')) = (finished_at IS NULL)", name=op.f("ck_jobs_finished")),
        sa.CheckConstraint("release IS NULL OR state = 'succeeded'", name=op.f("ck_jobs_release")),
        sa.CheckConstraint("state <> 'failed' OR error IS NOT NULL", name=op.f("ck_jobs_error")),
        sa.CheckConstraint(
            "state IN ('cancelled', 'failed', 'queued', 'running', 'succeeded')", name=op.f("ck_jobs_state")
        ),
        sa.ForeignKeyConstraint(["model_name"], ["models.name"], name=op.f("fk_jobs_model_name")),
        sa.ForeignKeyConstraint(["target_task"], ["tasks.id"], name=op.f("fk_jobs_target_task")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index("ix_jobs_active", "jobs", ["created_at"], **where("state IN ('queued', 'running')"))
    op.create_index("ix_jobs_active_target", "jobs", ["target_task"], **where("state IN ('queued', 'running')"))
    op.create_index(op.f("ix_jobs_created_at"), "jobs", ["created_at"])
    op.create_table(
        "task_inputs",
        sa.Column("task_id", sa.String(64), nullable=False),
        sa.Column("source_id", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["source_id"], ["tasks.id"], name=op.f("fk_task_inputs_source_id")),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f("fk_task_inputs_task_id")),
        sa.PrimaryKeyConstraint("task_id", "source_id", name=op.f("pk_task_inputs")),
    )
    op.create_index(op.f("ix_task_inputs_source_id"), "task_inputs", ["source_id"])
    op.create_table(
        "events",
        sa.Column("id", SERIAL, sa.Identity(), nullable=False),
        sa.Column("job_id", sa.String(12)),
        sa.Column("task_id", sa.String(64)),
        sa.Column("attempt", sa.Integer()),
        sa.Column("at", DOUBLE, nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.CheckConstraint("job_id IS NOT NULL OR task_id IS NOT NULL", name=op.f("ck_events_subject")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id")),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f("fk_events_task_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_job_id"), "events", ["job_id"])
    op.create_table(
        "job_tasks",
        sa.Column("job_id", sa.String(12), nullable=False),
        sa.Column("task_id", sa.String(64), nullable=False),
        sa.Column("cached", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_tasks_job_id")),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f("fk_job_tasks_task_id")),
        sa.PrimaryKeyConstraint("job_id", "task_id", name=op.f("pk_job_tasks")),
    )
    op.create_index(op.f("ix_job_tasks_task_id"), "job_tasks", ["task_id"])
    op.create_table(
        "releases",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.String(12), nullable=False),
        sa.Column("created_at", DOUBLE, nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_releases_bytes")),
        sa.CheckConstraint("version >= 1", name=op.f("ck_releases_version")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_releases_job_id")),
        sa.PrimaryKeyConstraint("name", "version", name=op.f("pk_releases")),
        sa.UniqueConstraint("name", "digest", name=op.f("uq_releases_name_digest")),
    )
    op.create_index(op.f("ix_releases_digest"), "releases", ["digest"])
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("alias", sa.String(128), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["name", "version"], ["releases.name", "releases.version"], name=op.f("fk_aliases_name_version")
        ),
        sa.PrimaryKeyConstraint("name", "alias", name=op.f("pk_aliases")),
    )


def downgrade() -> None:
    """Drop every table, each after those that refer to it."""
    for table in (
        "aliases",
        "releases",
        "events",
        "job_tasks",
        "task_inputs",
        "jobs",
        "tasks",
        "results",
        "kind_timings",
        "models",
    ):
        op.drop_table(table)
