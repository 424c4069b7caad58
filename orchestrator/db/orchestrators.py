"""The processes that work on this database, what each says of its cluster, and what they wait for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from orchestrator.db.clock import database_time, epoch_seconds
from orchestrator.db.models import Orchestrator
from orchestrator.db.statements import insert_into
from orchestrator.processes import has_ended

#: An orchestrator that was not heard of for so many seconds is shown as gone, and forgotten after a day.
GONE_SECONDS, FORGOTTEN_SECONDS = 60.0, 86_400.0
_REASON_CHARACTERS = 1000


class OrchestratorState(StrEnum):
    """What an orchestrator does; GONE is never stored, but follows from its silence."""

    WORKING = "working"
    WAITING = "waiting"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class OrchestratorNote:
    """What an orchestrator says of itself; `reason` is what it waits for, `cluster` JSON about what it sees.

    There, `process` names the process itself (`orchestrator.processes`).
    """

    id: str
    host: str
    pid: int
    state: OrchestratorState
    reason: str | None = None
    cluster: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OrchestratorRow:
    """An orchestrator, as it last said, `silent_seconds` ago."""

    note: OrchestratorNote
    started_at: float
    silent_seconds: float


def see_orchestrator(session: Session, note: OrchestratorNote, *, first: bool = False) -> None:
    """Note that an orchestrator is there; `first`: it has just begun."""
    reason = None if note.reason is None else note.reason.replace("\0", "")[:_REASON_CHARACTERS]
    values = {"host": note.host, "pid": note.pid, "state": note.state.value, "reason": reason}
    values |= {"cluster": dict(note.cluster), "seen_at": epoch_seconds()}
    if first:
        # Those that were killed long ago; their rows have no one else to remove them.
        session.execute(delete(Orchestrator).where(Orchestrator.seen_at < epoch_seconds() - FORGOTTEN_SECONDS))
    statement = insert_into(session, Orchestrator).values(id=note.id, started_at=epoch_seconds(), **values)
    again = values | ({"started_at": epoch_seconds()} if first else {})
    session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=again))


def forget_orchestrator(session: Session, orchestrator: str) -> None:
    """Remove one that has ended."""
    session.execute(delete(Orchestrator).where(Orchestrator.id == orchestrator))


def list_orchestrators(session: Session) -> list[OrchestratorRow]:
    """Return all that were heard of within a day, those that began first in front."""
    now = database_time(session)
    found = []
    for row in session.scalars(select(Orchestrator).order_by(Orchestrator.started_at, Orchestrator.id)):
        silent = max(0.0, now - row.seen_at)
        state = OrchestratorState.GONE if silent > GONE_SECONDS else OrchestratorState(row.state)
        note = OrchestratorNote(row.id, row.host, row.pid, state, row.reason, row.cluster)
        found.append(OrchestratorRow(note, row.started_at, silent))
    return found


def ended_here(session: Session) -> list[str]:
    """Return the ids of the orchestrators that said nothing more before their processes, on this machine, ended."""
    notes = session.execute(select(Orchestrator.id, Orchestrator.cluster))
    return [name for name, cluster in notes if has_ended(cluster.get("process", {}))]


def waiting_reason(session: Session) -> str | None:
    """Return what all orchestrators that are there wait for; None if one works, or none is there."""
    notes = [each.note for each in list_orchestrators(session) if each.note.state is not OrchestratorState.GONE]
    if not notes or any(note.state is OrchestratorState.WORKING for note in notes):
        return None
    return "; ".join(dict.fromkeys(note.reason or "unknown" for note in notes))


def clusters(session: Session) -> dict[str, Mapping[str, Any]]:
    """Return what the orchestrators that are there say of their clusters, by their ids."""
    notes = (each.note for each in list_orchestrators(session))
    return {note.id: note.cluster for note in notes if note.state is not OrchestratorState.GONE}


def gpu_types(found: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the types of GPU of some clusters that take tasks."""
    nodes = (node for cluster in found.values() for node in cluster.get("nodes", ()))
    return {node["gpu_type"] or "cuda" for node in nodes if node["gpus"] and not node["left_out"]}
