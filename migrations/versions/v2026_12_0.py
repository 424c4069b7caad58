"""A GPU cluster: what tasks need and where they ran, who works on the database, which store belongs to it; searches."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

from orchestrator.db.reference_checks import Reference, create_checks, drop_checks

revision = "2026.12.0"
down_revision = "2026.11.0"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True)
DOUBLE = sa.Float(precision=53)

REFERENCES = (
    Reference("task_inputs", "task_id", "tasks"),
    Reference("task_inputs", "source_id", "tasks"),
    Reference("job_tasks", "job_id", "jobs"),
    Reference("job_tasks", "task_id", "tasks"),
    Reference("events", "job_id", "jobs"),
    Reference("events", "task_id", "tasks"),
)
# Tasks of nearly the same size are one group.
_MEMORY_STEP = 256 << 20


def upgrade() -> None:
    """Add columns and tables; timings so far are of CPUs."""
    # One after the other and not in a batch: SQLite would copy the table, and lose its indexes on expressions.
    op.add_column("jobs", sa.Column("device", sa.String(8), nullable=False, server_default="auto"))
    op.add_column("jobs", sa.Column("gpu_type", sa.String(128)))
    op.add_column("jobs", sa.Column("search_id", sa.String(12)))
    op.add_column("jobs", sa.Column("owner", sa.String(128), nullable=False, server_default=""))
    op.create_index("ix_jobs_search_id", "jobs", ["search_id"])
    for column in (
        sa.Column("gpu_memory_bytes", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("device", sa.String(8), nullable=False, server_default="auto"),
        sa.Column("gpu_type", sa.String(128)),
        sa.Column("alone", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("batch_divisor", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("deadline_seconds", DOUBLE),
        sa.Column("ran_on", sa.Text()),
        sa.Column("queued_at", DOUBLE),
        sa.Column("repairs", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("needs", sa.Text(), nullable=False, server_default=""),
        sa.Column("deterministic", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("rank", DOUBLE, nullable=False, server_default="0"),
    ):
        op.add_column("tasks", column)
    _name_needs()
    op.drop_index("ix_tasks_queued", "tasks")
    op.drop_index("ix_tasks_queued_cpu", "tasks")
    queued = ["needs", "alone", sa.text("priority DESC"), "rank", "seq"]
    op.create_index("ix_tasks_queued_needs", "tasks", queued, **_where("state = 'queued'"))
    op.add_column("task_inputs", sa.Column("places", JSON))
    op.add_column("results", sa.Column("ran", JSON, nullable=False, server_default=sa.text("'{}'")))
    op.rename_table("kind_timings", "kind_timings_before")
    _make_timings(with_device=True)
    op.execute(
        "INSERT INTO kind_timings (kind, version, n, seconds, work) "
        "SELECT kind, version, n, seconds, work FROM kind_timings_before"
    )
    op.drop_table("kind_timings_before")
    op.drop_index("ix_events_job_id", "events")
    op.create_index("ix_events_job_id", "events", ["job_id"], **_where("job_id IS NOT NULL"))
    if _is_postgres():
        for table, held, _, _ in REFERENCES:
            op.drop_constraint(f"fk_{table}_{held}", table, type_="foreignkey")
        for statement in create_checks(REFERENCES):
            op.execute(statement)
    op.create_table(
        "service",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("store_id", sa.String(32)),
        sa.Column("created_at", DOUBLE, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_service")),
    )
    op.create_table(
        "orchestrators",
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started_at", DOUBLE, nullable=False),
        sa.Column("seen_at", DOUBLE, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("cluster", JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_orchestrators")),
    )
    op.create_table(
        "signatures",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("bundle", sa.Text(), nullable=False),
        sa.Column("created_at", DOUBLE, nullable=False),
        sa.PrimaryKeyConstraint("digest", "key_id", name=op.f("pk_signatures")),
    )
    op.create_table(
        "owners",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("rank", DOUBLE, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_owners")),
    )
    _make_searches()
    clock = "extract(epoch FROM now())" if op.get_context().dialect.name == "postgresql" else "strftime('%s', 'now')"
    insert = sa.text(f"INSERT INTO service (id, created_at) VALUES (:id, {clock})")
    op.get_bind().execute(insert.bindparams(id=uuid.uuid4().hex))


def downgrade() -> None:
    """Go back; times on GPUs, where tasks ran, and searches are forgotten."""
    for table in ("search_points", "search_models", "searches", "owners"):
        op.drop_table(table)
    if _is_postgres():
        for statement in drop_checks(REFERENCES):
            op.execute(statement)
        for table, held, target, _ in REFERENCES:
            op.create_foreign_key(f"fk_{table}_{held}", table, target, [held], ["id"])
    op.drop_index("ix_events_job_id", "events")
    op.create_index("ix_events_job_id", "events", ["job_id"])
    op.drop_table("signatures")
    op.drop_table("orchestrators")
    op.drop_table("service")
    op.rename_table("kind_timings", "kind_timings_before")
    _make_timings(with_device=False)
    op.execute(
        "INSERT INTO kind_timings (kind, version, n, seconds, work) "
        "SELECT kind, version, sum(n), sum(seconds), sum(work) FROM kind_timings_before "
        "WHERE device = 'cpu' GROUP BY kind, version"
    )
    op.drop_table("kind_timings_before")
    op.drop_column("results", "ran")
    op.drop_index("ix_tasks_queued_needs", "tasks")
    op.create_index("ix_tasks_queued", "tasks", [sa.text("priority DESC"), "seq"], **_where("state = 'queued'"))
    op.create_index(
        "ix_tasks_queued_cpu", "tasks", [sa.text("priority DESC"), "seq"], **_where("state = 'queued' AND gpus = 0")
    )
    op.drop_column("task_inputs", "places")
    for column in (
        "rank",
        "needs",
        "deterministic",
        "repairs",
        "queued_at",
        "ran_on",
        "deadline_seconds",
        "batch_divisor",
        "alone",
        "gpu_type",
        "device",
    ):
        op.drop_column("tasks", column)
    op.drop_column("tasks", "gpu_memory_bytes")
    op.drop_index("ix_jobs_search_id", "jobs")
    for column in ("owner", "search_id", "gpu_type", "device"):
        op.drop_column("jobs", column)


def _make_searches() -> None:
    """Make the tables of searches."""
    states = "'cancelled', 'failed', 'queued', 'running', 'succeeded'"
    op.create_table(
        "searches",
        sa.Column("id", sa.String(12), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("only", sa.String(16)),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("recipes", JSON, nullable=False),
        sa.Column("latency", JSON),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_at", DOUBLE, nullable=False),
        sa.Column("started_at", DOUBLE),
        sa.Column("finished_at", DOUBLE),
        sa.Column("error", sa.Text()),
        sa.CheckConstraint(f"state IN ({states})", name=op.f("ck_searches_state")),
        sa.CheckConstraint(
            "(state IN ('queued', 'running')) = (finished_at IS NULL)", name=op.f("ck_searches_finished")
        ),
        sa.CheckConstraint("state <> 'failed' OR error IS NOT NULL", name=op.f("ck_searches_error")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_searches")),
    )
    op.create_index("ix_searches_open", "searches", ["created_at"], **_where("state IN ('queued', 'running')"))
    for column in ("created_at", "digest"):
        op.create_index(f"ix_searches_{column}", "searches", [column])
    op.create_table(
        "search_models",
        sa.Column("search_id", sa.String(12), nullable=False),
        sa.Column("model_name", sa.String(128), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("model_digest", sa.String(64), nullable=False),
        sa.Column("shape_digest", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("last_round", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(12)),
        sa.Column("parent", sa.String(12)),
        sa.Column("parent_model", sa.String(128)),
        sa.Column("proposed", JSON),
        sa.Column("error", sa.Text()),
        sa.CheckConstraint(f"state IN ({states})", name=op.f("ck_search_models_state")),
        sa.CheckConstraint(
            "stage IN ('sensitivity', 'screening', 'final', 'done')", name=op.f("ck_search_models_stage")
        ),
        sa.CheckConstraint("state <> 'failed' OR error IS NOT NULL", name=op.f("ck_search_models_error")),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name=op.f("fk_search_models_search_id")),
        sa.ForeignKeyConstraint(["model_name"], ["models.name"], name=op.f("fk_search_models_model_name")),
        sa.PrimaryKeyConstraint("search_id", "model_name", name=op.f("pk_search_models")),
    )
    for column in ("model_digest", "shape_digest"):
        op.create_index(f"ix_search_models_{column}", "search_models", [column])
    op.create_table(
        "search_points",
        sa.Column("search_id", sa.String(12), nullable=False),
        sa.Column("model_name", sa.String(128), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("origin", sa.String(128), nullable=False),
        sa.Column("budget", sa.Integer()),
        sa.Column("allocation", JSON, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(12)),
        sa.Column("predicted", JSON),
        sa.Column("screened", JSON),
        sa.Column("metrics", JSON),
        sa.Column("dropped", sa.Text()),
        sa.Column("release", sa.String(160)),
        sa.CheckConstraint("stage IN ('screening', 'final')", name=op.f("ck_search_points_stage")),
        sa.ForeignKeyConstraint(
            ["search_id", "model_name"],
            ["search_models.search_id", "search_models.model_name"],
            name=op.f("fk_search_points_search_id_model_name"),
        ),
        sa.UniqueConstraint(
            "search_id", "model_name", "digest", name=op.f("uq_search_points_search_id_model_name_digest")
        ),
        sa.PrimaryKeyConstraint("search_id", "model_name", "number", name=op.f("pk_search_points")),
    )


def _make_timings(*, with_device: bool) -> None:
    """Make the table of timings; its primary key differs, which SQLite cannot change in place."""
    if _is_postgres():
        op.execute("ALTER TABLE kind_timings_before DROP CONSTRAINT pk_kind_timings")
    columns = [
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("seconds", DOUBLE, nullable=False),
        sa.Column("work", DOUBLE, nullable=False),
    ]
    key = ["kind", "version"]
    if with_device:
        columns += [
            sa.Column("device", sa.String(128), nullable=False, server_default="cpu"),
            sa.Column("peak_rss_bytes", sa.BigInteger(), nullable=False, server_default="0"),
            sa.Column("peak_gpu_bytes", sa.BigInteger(), nullable=False, server_default="0"),
            sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False, server_default="0"),
            sa.Column("memory_ratio", DOUBLE, nullable=False, server_default="0"),
            sa.Column("gpu_memory_ratio", DOUBLE, nullable=False, server_default="0"),
        ]
        key += ["device", "shard"]
    op.create_table("kind_timings", *columns, sa.PrimaryKeyConstraint(*key, name=op.f("pk_kind_timings")))


def _name_needs() -> None:
    """Name what the tasks ask for that are not over, much as `orchestrator.db.enqueue.needs_of` does for new ones."""
    unfinished = "state IN ('blocked', 'queued', 'running', 'failed', 'cancelled')"
    asked = op.get_bind().execute(sa.text(f"SELECT DISTINCT cpus, gpus, memory_bytes FROM tasks WHERE {unfinished}"))
    for cpus, gpus, memory in asked.all():
        statement = sa.text(
            f"UPDATE tasks SET needs = :needs WHERE {unfinished} "
            "AND cpus = :cpus AND gpus = :gpus AND memory_bytes = :memory"
        )
        needs = f"{cpus}/{gpus}/{-(-memory // _MEMORY_STEP)}/0/auto/None"
        op.execute(statement.bindparams(needs=needs, cpus=cpus, gpus=gpus, memory=memory))


def _where(condition: str) -> dict[str, sa.TextClause]:
    """Restrict an index to some rows, on both databases."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def _is_postgres() -> bool:
    return op.get_context().dialect.name == "postgresql"
