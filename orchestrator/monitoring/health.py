"""Is an orchestrator alive, and can it work now? What `/healthz` and `/readyz` answer."""

from __future__ import annotations

from typing import Any

from orchestrator.scheduling.watch import SchedulerStatus

#: A loop that did not go round for so long hangs. Starting Ray, the longest step that is none, takes 120 s at most.
HUNG_SECONDS = 300.0
#: A loop that did not go round for so long is not ready, whatever it waits for.
BUSY_SECONDS = 30.0


def health(status: SchedulerStatus) -> dict[str, Any]:
    """Return what the two addresses answer as JSON: `live`, `ready`, why not, and seconds since the loop went round."""
    silent = status.silent_seconds
    live = silent < HUNG_SECONDS
    reason = status.waiting_for
    if not reason and silent >= BUSY_SECONDS:
        reason = f"the loop did not go round for {silent:.0f} s"
    return {"live": live, "ready": live and not reason, "reason": reason or None, "silent_seconds": round(silent, 1)}
