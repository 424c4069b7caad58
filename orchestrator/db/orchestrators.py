"""The processes that work on this database, and what each says of its cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import Orchestrator
from orchestrator.db.statements import insert_into

#: One that has not been seen for so long is taken for gone.
GONE_SECONDS = 60.0


def note_cluster(session: Session, owner: str, host: str, pid: int, cluster: Mapping[str, Any]) -> None:
    """Say that an orchestrator is at work, and what its cluster is made of (`Places.document`)."""
    now = epoch_seconds()
    values = {"id": owner, "host": host, "pid": pid, "started_at": now, "seen_at": now, "state": "working"}
    statement = insert_into(session, Orchestrator).values(**values, cluster=dict(cluster))
    new = {"seen_at": statement.excluded.seen_at, "cluster": statement.excluded.cluster}
    session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=new))


def forget_orchestrator(session: Session, owner: str) -> None:
    """Say that an orchestrator has ended."""
    statement = delete(Orchestrator).where(Orchestrator.id == owner)
    session.execute(statement, execution_options={"synchronize_session": False})


def clusters(session: Session) -> dict[str, dict[str, Any]]:
    """Return what the orchestrators that are at work say of their clusters, by their ids."""
    statement = select(Orchestrator.id, Orchestrator.cluster).order_by(Orchestrator.started_at)
    rows = session.execute(statement.where(Orchestrator.seen_at > epoch_seconds() - GONE_SECONDS))
    return {row.id: row.cluster for row in rows}


def gpu_types(found: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the types of GPU of some clusters that take tasks."""
    nodes = (node for cluster in found.values() for node in cluster.get("nodes", ()))
    return {node["gpu_type"] or "cuda" for node in nodes if node["gpus"] and not node["left_out"]}
