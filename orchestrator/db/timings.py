"""What tasks took, by kind and type of device: kept as results come, read by estimates and placement."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from orchestrator.db.models import KindTiming
from orchestrator.db.rows import Timing
from quant_spec.kinds import KINDS

_CPU = "cpu"


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
    sums = (func.sum(KindTiming.n), func.sum(KindTiming.seconds), func.sum(KindTiming.work))
    ratios = (func.max(KindTiming.memory_ratio), func.max(KindTiming.gpu_memory_ratio))
    named = (KindTiming.kind, KindTiming.device, KindTiming.version)
    rows = session.execute(select(*named, *sums, *ratios).group_by(*named).order_by(*named))
    return {
        (kind, device): Timing(int(n), seconds, work, memory, gpu)
        for kind, device, _, n, seconds, work, memory, gpu in rows
    }
