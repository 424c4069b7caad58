"""The tables. What must always hold is a constraint here, or a trigger (`reference_checks.py`).

Alembic (migrations/) is the only way that they change.

models ── jobs ─┬─ job_tasks ── tasks ── task_inputs (which task reads which)
                └─ releases ── aliases      results (by key), kind_timings (sums over results), events
signatures (of what was released, by key), service (which database this is), orchestrators (who works on it)
searches ── search_models ── search_points (each has its jobs)
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ColumnElement,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
    literal_column,
    text,
)
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Mapped, mapped_column

from orchestrator.db.reference_checks import add_to, reference
from orchestrator.states import ACTIVE_JOBS, JobState, TaskState

#: Schema revisions, oldest first, as named in migrations/versions. The last is the one that this code works with.
REVISIONS = ("2026.11.0", "2026.12.0", "2026.12.1", "2026.12.2")

Digest = String(64)
Name = String(128)
Json = JSON(none_as_null=True)
Seconds = Float(53)
# SQLite numbers rows only in a column that is exactly INTEGER PRIMARY KEY.
Serial = BigInteger().with_variant(Integer(), "sqlite")


def sql_list(values: Iterable[StrEnum]) -> str:
    """Write states as an SQL list, in a fixed order."""
    return ", ".join(f"'{value.value}'" for value in sorted(values))


def in_states(
    column: ColumnElement[str] | InstrumentedAttribute[str], states: Iterable[StrEnum]
) -> ColumnElement[bool]:
    """Compare a state with literals: a bound parameter would keep both databases from using a partial index."""
    values = sorted(states)
    if len(values) == 1:
        return column == literal_column(f"'{values[0].value}'")
    return column.in_([literal_column(f"'{value.value}'") for value in values])


class Base(DeclarativeBase):
    """Base of the tables; constraints are named so that SQLite's batch migrations can find them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Model(Base):
    """A registered model."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(Name, primary_key=True)
    digest: Mapped[str] = mapped_column(Digest, index=True)
    class_name: Mapped[str] = mapped_column(Text)
    source: Mapped[str] = mapped_column(Text)
    bytes: Mapped[int] = mapped_column(BigInteger)
    parameters: Mapped[int] = mapped_column(BigInteger)
    inspection: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[float] = mapped_column(Seconds)


class Job(Base):
    """A recipe applied to a model. `target_task` is the task that ends it.

    `owner` is who submitted it, `search_id` the search that wants it, if one does.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"state IN ({sql_list(JobState)})", name="state"),
        CheckConstraint(f"(state IN ({sql_list(ACTIVE_JOBS)})) = (finished_at IS NULL)", name="finished"),
        CheckConstraint("state <> 'failed' OR error IS NOT NULL", name="error"),
        CheckConstraint("release IS NULL OR state = 'succeeded'", name="release"),
        Index("ix_jobs_active", "created_at", postgresql_where=text("state IN ('queued', 'running')"),
              sqlite_where=text("state IN ('queued', 'running')")),
        Index("ix_jobs_active_target", "target_task", postgresql_where=text("state IN ('queued', 'running')"),
              sqlite_where=text("state IN ('queued', 'running')")),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    priority: Mapped[int] = mapped_column(Integer)
    model_name: Mapped[str] = mapped_column(ForeignKey("models.name"))
    model_digest: Mapped[str] = mapped_column(Digest)
    recipe_name: Mapped[str] = mapped_column(Text)
    recipe_digest: Mapped[str] = mapped_column(Digest)
    recipe: Mapped[dict[str, Any]] = mapped_column(Json)
    release_name: Mapped[str | None] = mapped_column(Name)
    target_task: Mapped[str | None] = mapped_column(ForeignKey("tasks.id"))
    created_at: Mapped[float] = mapped_column(Seconds, index=True)
    started_at: Mapped[float | None] = mapped_column(Seconds)
    finished_at: Mapped[float | None] = mapped_column(Seconds)
    error: Mapped[str | None] = mapped_column(Text)
    release: Mapped[str | None] = mapped_column(String(160))
    digest: Mapped[str | None] = mapped_column(Digest)
    metrics: Mapped[dict[str, Any] | None] = mapped_column(Json)
    device: Mapped[str] = mapped_column(String(8), server_default="auto")
    gpu_type: Mapped[str | None] = mapped_column(Name)
    search_id: Mapped[str | None] = mapped_column(String(12), index=True)
    owner: Mapped[str] = mapped_column(Name, server_default="")


class Task(Base):
    """One task, which several jobs may share.

    `inputs` holds digests and, while the task is blocked, references to other tasks' outputs; `waiting` counts the
    distinct tasks among them that have not succeeded. `seq` is the order of arrival; of equal priority the lowest
    `rank` is claimed first (`fairness.py`), then the lowest `seq`. A lease's columns are set exactly while the task is
    running.

    `gpu_memory_bytes` is what it takes on a GPU (0: no GPU helps), `gpus` how many it cannot do without; `device`
    ("auto", "cpu", "cuda") and `gpu_type` are what its jobs allow, `deterministic` that one of them asks for.
    `alone` asks for a whole GPU, `batch_divisor` for smaller batches, both after an attempt that ran out of memory.
    `ran_on` is the node of the last attempt; `queued_at` since when it could have been claimed; `repairs` how often it
    ran again because its outputs had been lost. `needs` names all that it asks for (`enqueue.needs_of`): tasks of equal
    needs are one group for the claim.
    """

    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint(f"state IN ({sql_list(TaskState)})", name="state"),
        CheckConstraint("(state = 'running') = (lease_token IS NOT NULL)", name="lease_token"),
        CheckConstraint("(state = 'running') = (lease_owner IS NOT NULL)", name="lease_owner"),
        CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="lease_until"),
        CheckConstraint("state NOT IN ('queued', 'running', 'succeeded') OR key IS NOT NULL", name="key"),
        CheckConstraint("state NOT IN ('queued', 'running', 'succeeded') OR waiting = 0", name="ready"),
        CheckConstraint("state <> 'failed' OR error IS NOT NULL", name="error"),
        CheckConstraint(
            "waiting >= 0 AND attempt >= 0 AND faults_task >= 0 AND faults_infrastructure >= 0", name="counts"
        ),
        CheckConstraint("cpus >= 0 AND gpus >= 0 AND memory_bytes >= 0 AND work >= 0", name="resources"),
        # The claim reads the head of each group of equal needs and never sorts, nor passes over what does not fit. Who
        # looks for a key does not say that nothing is waited for, nor that a lease is held, and so must take the index
        # of keys: where statistics saw nothing queued, Postgres takes a look through all of one for as cheap as at one.
        Index("ix_tasks_queued_needs", "needs", "alone", text("priority DESC"), "rank", "seq",
              postgresql_where=text("state = 'queued' AND waiting = 0"), sqlite_where=text("state = 'queued'")),
        Index("ix_tasks_queued_key", "key", postgresql_where=text("state = 'queued'"),
              sqlite_where=text("state = 'queued'")),
        # The same result is never computed twice at once, whatever the tasks' ids.
        Index("uq_tasks_running_key", "key", unique=True, postgresql_where=text("state = 'running'"),
              sqlite_where=text("state = 'running'")),
        Index("ix_tasks_lease_until", "lease_until", sqlite_where=text("state = 'running'"),
              postgresql_where=text("state = 'running' AND lease_until IS NOT NULL")),
    )  # fmt: skip

    seq: Mapped[int] = mapped_column(Serial, Identity(), primary_key=True)
    id: Mapped[str] = mapped_column(Digest, unique=True)
    kind: Mapped[str] = mapped_column(String(64))
    version: Mapped[int] = mapped_column(Integer)
    params: Mapped[dict[str, Any]] = mapped_column(Json)
    inputs: Mapped[dict[str, list[Any]]] = mapped_column(Json)
    cpus: Mapped[float] = mapped_column(Float(53))
    gpus: Mapped[float] = mapped_column(Float(53))
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    work: Mapped[float] = mapped_column(Float(53))
    label: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    waiting: Mapped[int] = mapped_column(Integer)
    key: Mapped[str | None] = mapped_column(Digest)
    priority: Mapped[int] = mapped_column(Integer)
    not_before: Mapped[float] = mapped_column(Seconds)
    attempt: Mapped[int] = mapped_column(Integer)
    faults_task: Mapped[int] = mapped_column(Integer)
    faults_infrastructure: Mapped[int] = mapped_column(Integer)
    lease_token: Mapped[str | None] = mapped_column(String(64))
    lease_owner: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[float | None] = mapped_column(Seconds)
    started_at: Mapped[float | None] = mapped_column(Seconds)
    finished_at: Mapped[float | None] = mapped_column(Seconds)
    error: Mapped[str | None] = mapped_column(Text)
    gpu_memory_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    device: Mapped[str] = mapped_column(String(8), server_default="auto")
    gpu_type: Mapped[str | None] = mapped_column(Name)
    alone: Mapped[bool] = mapped_column(server_default=false())
    batch_divisor: Mapped[int] = mapped_column(Integer, server_default="1")
    deadline_seconds: Mapped[float | None] = mapped_column(Seconds)
    ran_on: Mapped[str | None] = mapped_column(Text)
    queued_at: Mapped[float | None] = mapped_column(Seconds)
    repairs: Mapped[int] = mapped_column(Integer, server_default="0")
    needs: Mapped[str] = mapped_column(Text, server_default="")
    deterministic: Mapped[bool] = mapped_column(server_default=false())
    rank: Mapped[float] = mapped_column(Float(53), server_default="0")


class Owner(Base):
    """Somebody who submits jobs; `rank` is that of the next task that comes from there (`fairness.py`)."""

    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(Name, primary_key=True)
    rank: Mapped[float] = mapped_column(Float(53))


class TaskInput(Base):
    """The task numbered `task_seq` reads outputs of the task `source_seq`.

    By number and not by id: edges are the most of all rows, each in two indexes, and with ids of 64 digits took three
    times as long to insert.

    `places` says which and where, as [input, position, output]: what the task's inputs are made of again once the
    outputs are lost. Null in rows of releases before 2026.12.
    """

    __tablename__ = "task_inputs"
    __table_args__ = (reference("task_inputs", "source_seq"), reference("task_inputs", "task_seq"))

    task_seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    source_seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False, index=True)
    places: Mapped[list[list[Any]] | None] = mapped_column(Json)


class JobTask(Base):
    """A job wants a task; `cached` if it needed no computing for that job."""

    __tablename__ = "job_tasks"
    __table_args__ = (reference("job_tasks", "job_id"), reference("job_tasks", "task_id"))

    job_id: Mapped[str] = mapped_column(String(12), primary_key=True)
    task_id: Mapped[str] = mapped_column(Digest, primary_key=True, index=True)
    cached: Mapped[bool]


class Result(Base):
    """What a key's task gave: names to digests, and metrics. Written once, and withdrawn if the bytes are lost.

    `ran` says where: node, device type, versions of the code.
    """

    __tablename__ = "results"

    key: Mapped[str] = mapped_column(Digest, primary_key=True)
    kind: Mapped[str] = mapped_column(String(64))
    outputs: Mapped[dict[str, str]] = mapped_column(Json)
    metrics: Mapped[dict[str, Any]] = mapped_column(Json)
    seconds: Mapped[float] = mapped_column(Seconds)
    created_at: Mapped[float] = mapped_column(Seconds)
    ran: Mapped[dict[str, Any]] = mapped_column(Json, server_default=text("'{}'"))


class KindTiming(Base):
    """Sums over the recorded results of one kind and version on one type of device, kept as they come.

    `device` is "cpu" or a GPU's type; the peaks are the greatest that any task had, the ratios the greatest of a peak
    to what had been estimated. Writers that finish tasks at the same moment add to rows of different `shard`, as one
    would else wait for the other's commit; readers add them up.
    """

    __tablename__ = "kind_timings"

    kind: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    n: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float] = mapped_column(Seconds)
    work: Mapped[float] = mapped_column(Float(53))
    device: Mapped[str] = mapped_column(Name, primary_key=True, server_default="cpu")
    peak_rss_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    peak_gpu_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    shard: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False, server_default="0")
    memory_ratio: Mapped[float] = mapped_column(Float(53), server_default="0")
    gpu_memory_ratio: Mapped[float] = mapped_column(Float(53), server_default="0")


class ServiceRow(Base):
    """Which database this is: one row, made with the schema. `store_id` is that of the store that belongs to it."""

    __tablename__ = "service"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    store_id: Mapped[str | None] = mapped_column(String(32))
    created_at: Mapped[float] = mapped_column(Seconds)


class Orchestrator(Base):
    """A process that works on this database; `state` is "working" or "waiting", then `reason` says for what.

    `cluster` is JSON about the nodes that it sees and what of them is in use.
    """

    __tablename__ = "orchestrators"

    id: Mapped[str] = mapped_column(Name, primary_key=True)
    host: Mapped[str] = mapped_column(Text)
    pid: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[float] = mapped_column(Seconds)
    seen_at: Mapped[float] = mapped_column(Seconds)
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    cluster: Mapped[dict[str, Any]] = mapped_column(Json)


class Event(Base):
    """One line of the log; how a reader that follows it misses none: `event_log.py`."""

    __tablename__ = "events"
    __table_args__ = (
        CheckConstraint("job_id IS NOT NULL OR task_id IS NOT NULL", name="subject"),
        reference("events", "job_id"),
        reference("events", "task_id"),
        Index("ix_events_job_id", "job_id", postgresql_where=text("job_id IS NOT NULL"),
              sqlite_where=text("job_id IS NOT NULL")),
    )  # fmt: skip

    id: Mapped[int] = mapped_column(Serial, Identity(), primary_key=True)
    job_id: Mapped[str | None] = mapped_column(String(12))
    task_id: Mapped[str | None] = mapped_column(Digest)
    attempt: Mapped[int | None] = mapped_column(Integer)
    at: Mapped[float] = mapped_column(Seconds)
    event: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict[str, Any]] = mapped_column(Json)


class Release(Base):
    """A published artifact. The same bytes under the same name are one version."""

    __tablename__ = "releases"
    __table_args__ = (
        UniqueConstraint("name", "digest"),
        CheckConstraint("version >= 1", name="version"),
        CheckConstraint("bytes >= 0", name="bytes"),
    )

    name: Mapped[str] = mapped_column(Name, primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(Digest, index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float] = mapped_column(Seconds)
    metrics: Mapped[dict[str, Any]] = mapped_column(Json)


class Signature(Base):
    """Who vouches for an artifact: a Sigstore bundle, as JSON, by the key that made it."""

    __tablename__ = "signatures"

    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    key_id: Mapped[str] = mapped_column(Digest, primary_key=True)
    bundle: Mapped[str] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(Seconds)


class Alias(Base):
    """A movable name of one version of a release."""

    __tablename__ = "aliases"
    __table_args__ = (ForeignKeyConstraint(["name", "version"], ["releases.name", "releases.version"]),)

    name: Mapped[str] = mapped_column(Name, primary_key=True)
    alias: Mapped[str] = mapped_column(Name, primary_key=True)
    version: Mapped[int] = mapped_column(Integer)


class Search(Base):
    """A search over models and choices of bits.

    `spec` is what was asked for (`quant_spec.search.SearchSpec`), `recipes` the base recipe and its variants, resolved,
    by name; `latency` a measured table of latencies. `only` is "sensitivity" if no candidate is to be measured.
    `digest` names all that decides the outcome: who asks for the same again is shown the one that is open.
    """

    __tablename__ = "searches"
    __table_args__ = (
        CheckConstraint(f"state IN ({sql_list(JobState)})", name="state"),
        CheckConstraint(f"(state IN ({sql_list(ACTIVE_JOBS)})) = (finished_at IS NULL)", name="finished"),
        CheckConstraint("state <> 'failed' OR error IS NOT NULL", name="error"),
        Index("ix_searches_open", "created_at", postgresql_where=text("state IN ('queued', 'running')"),
              sqlite_where=text("state IN ('queued', 'running')")),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(Name)
    owner: Mapped[str] = mapped_column(Name)
    state: Mapped[str] = mapped_column(String(16))
    priority: Mapped[int] = mapped_column(Integer)
    only: Mapped[str | None] = mapped_column(String(16))
    spec: Mapped[dict[str, Any]] = mapped_column(Json)
    recipes: Mapped[dict[str, Any]] = mapped_column(Json)
    latency: Mapped[dict[str, Any] | None] = mapped_column(Json)
    digest: Mapped[str] = mapped_column(Digest, index=True)
    created_at: Mapped[float] = mapped_column(Seconds, index=True)
    started_at: Mapped[float | None] = mapped_column(Seconds)
    finished_at: Mapped[float | None] = mapped_column(Seconds)
    error: Mapped[str | None] = mapped_column(Text)


class SearchModel(Base):
    """One model of a search, and how far its own search is.

    `job_id` is the job that its next step waits for (sensitivities and what follows from them), `parent` the search
    whose front it starts from. Candidates are proposed until `last_round`. `proposed` is what the last proposals said
    beside their points.
    """

    __tablename__ = "search_models"
    __table_args__ = (
        CheckConstraint(f"state IN ({sql_list(JobState)})", name="state"),
        CheckConstraint("stage IN ('sensitivity', 'screening', 'final', 'done')", name="stage"),
        CheckConstraint("state <> 'failed' OR error IS NOT NULL", name="error"),
    )

    search_id: Mapped[str] = mapped_column(ForeignKey("searches.id"), primary_key=True)
    model_name: Mapped[str] = mapped_column(ForeignKey("models.name"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer)
    model_digest: Mapped[str] = mapped_column(Digest, index=True)
    shape_digest: Mapped[str] = mapped_column(Digest, index=True)
    state: Mapped[str] = mapped_column(String(16))
    stage: Mapped[str] = mapped_column(String(16))
    round: Mapped[int] = mapped_column(Integer)
    last_round: Mapped[int] = mapped_column(Integer)
    job_id: Mapped[str | None] = mapped_column(String(12))
    parent: Mapped[str | None] = mapped_column(String(12))
    parent_model: Mapped[str | None] = mapped_column(Name)
    proposed: Mapped[dict[str, Any] | None] = mapped_column(Json)
    error: Mapped[str | None] = mapped_column(Text)


class SearchPoint(Base):
    """One allocation of bits that a search measures; `number` counts within the model.

    `stage` is "screening" or "final", `job_id` the job that measures it there (None: not queued yet). `screened` and
    `metrics` are what the two stages measured, `dropped` is why it is not on the front, `release` what it was
    published as.
    """

    __tablename__ = "search_points"
    __table_args__ = (
        ForeignKeyConstraint(["search_id", "model_name"], ["search_models.search_id", "search_models.model_name"]),
        UniqueConstraint("search_id", "model_name", "digest"),
        CheckConstraint("stage IN ('screening', 'final')", name="stage"),
    )

    search_id: Mapped[str] = mapped_column(String(12), primary_key=True)
    model_name: Mapped[str] = mapped_column(Name, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    round: Mapped[int] = mapped_column(Integer)
    stage: Mapped[str] = mapped_column(String(16))
    origin: Mapped[str] = mapped_column(Name)
    budget: Mapped[int | None] = mapped_column(Integer)
    allocation: Mapped[dict[str, Any]] = mapped_column(Json)
    digest: Mapped[str] = mapped_column(Digest)
    job_id: Mapped[str | None] = mapped_column(String(12))
    predicted: Mapped[dict[str, Any] | None] = mapped_column(Json)
    screened: Mapped[dict[str, Any] | None] = mapped_column(Json)
    metrics: Mapped[dict[str, Any] | None] = mapped_column(Json)
    dropped: Mapped[str | None] = mapped_column(Text)
    release: Mapped[str | None] = mapped_column(String(160))


add_to(Base.metadata)
