"""What tasks took, by kind and type of device: kept as results come, read by estimates and placement."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from orchestrator.db.models import KindTiming
from orchestrator.db.rows import Timing
from orchestrator.db.statements import insert_into
from quant_spec.kinds import KINDS
from workers.execution.cluster import CUDA_CONTEXT_BYTES

_SUMS = ("n", "seconds", "work")
_PEAKS = ("peak_rss_bytes", "peak_gpu_bytes", "memory_ratio", "gpu_memory_ratio")
_CPU = "cpu"


def add_timing(session: Session, task: Any, seconds: float, ran: Mapping[str, Any]) -> None:
    """Add a task that succeeded: its row, the seconds that it took, and where it ran (`device`, peaks of memory)."""
    rss, gpu = (int(ran.get(name) or 0) for name in ("peak_rss_bytes", "peak_gpu_bytes"))
    values = {
        "kind": task.kind,
        "version": task.version,
        "device": str(ran.get("device") or _CPU),
        "n": 1,
        "seconds": seconds,
        "work": task.work,
        "peak_rss_bytes": rss,
        "peak_gpu_bytes": gpu,
        "memory_ratio": _ratio(rss, task.memory_bytes),
        # With a part of the batch it needed less than the next task of its kind will.
        "gpu_memory_ratio": _ratio(gpu and gpu * task.batch_divisor + CUDA_CONTEXT_BYTES, task.gpu_memory_bytes),
    }
    statement = insert_into(session, KindTiming).values(**values)
    new: dict[str, Any] = {name: getattr(KindTiming, name) + statement.excluded[name] for name in _SUMS}
    for name in _PEAKS:
        before, now = getattr(KindTiming, name), statement.excluded[name]
        new[name] = case((before > now, before), else_=now)
    session.execute(statement.on_conflict_do_update(index_elements=["kind", "version", "device"], set_=new))


def _ratio(peak: int, estimate: int) -> float:
    return peak / estimate if peak > 0 and estimate > 0 else 0.0


def kind_timings(session: Session, gpu_types: Collection[str] = ()) -> dict[str, Timing]:
    """Return what the recorded tasks of each kind took, of the newest version of the kind that has any.

    Parameters
    ----------
    gpu_types
        Of the cluster that is meant: kinds that gain by a GPU are judged by what they took on these, if that is known,
        all others by what they took on CPUs.
    """
    found: dict[str, Timing] = {}
    for (kind, device), timing in device_timings(session).items():
        on_gpu = device in gpu_types and kind in KINDS and KINDS[kind].gpu
        if on_gpu and device != _CPU:
            found[kind] = timing
        elif device == _CPU:
            found.setdefault(kind, timing)
    return found


def device_timings(session: Session) -> dict[tuple[str, str], Timing]:
    """Return what recorded tasks took by (kind, type of device), of the newest version of each that has any."""
    newest = select(KindTiming.kind, KindTiming.device, func.max(KindTiming.version).label("version"))
    last = newest.group_by(KindTiming.kind, KindTiming.device).subquery()
    rows = session.scalars(
        select(KindTiming)
        .join(
            last,
            (KindTiming.kind == last.c.kind)
            & (KindTiming.device == last.c.device)
            & (KindTiming.version == last.c.version),
        )
        .order_by(KindTiming.kind, KindTiming.device)
    )
    return {
        (row.kind, row.device): Timing(row.n, row.seconds, row.work, row.memory_ratio, row.gpu_memory_ratio)
        for row in rows
    }
