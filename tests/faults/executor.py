"""An executor that runs bodies in threads of this process, and misbehaves when told to."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from quant_spec.keys import task_key
from tests.faults.graphs import ARTIFACT, artifact_of
from tests.faults.history import Body
from tests.orchestrator.in_process import InProcess
from workers.errors import ExecutorError, Fault
from workers.execution.context import TaskOutput
from workers.execution.execute import TaskCall
from workers.execution.executor import Capacity, Finished

#: The clock of the harness; faults may set that of the program.
real_time = time.time
METRICS = {"psnr_db": 30.0}


@dataclass(slots=True)
class Orders:
    """How an executor misbehaves, for the next so many results: each is used up by what it spoils.

    `late` holds results back by `late_seconds`; `twice` delivers them again; `lost` reports a worker's loss in place of
    a result that is in the store; `faults` lets bodies fail that way without running.
    """

    late: int = 0
    late_seconds: float = 0.0
    twice: int = 0
    lost: int = 0
    faults: list[Fault] = field(default_factory=list)
    no_capacity_until: float = 0.0


class FaultyExecutor(InProcess):
    """Runs calls, each in a thread of its own."""

    def __init__(self, owner: str, cpus: float, gate: Callable[[str], None], bodies: list[Body]) -> None:
        """Run bodies for the scheduler `owner`, whose `gate` every call passes; add them to `bodies` when they end."""
        super().__init__(Capacity(cpus, 0.0, 1 << 40))
        self.orders = Orders()
        self.owner = owner
        self._cpus = cpus
        self._gate = gate
        self._bodies = bodies
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._ready: list[tuple[float, Finished]] = []
        self._running: dict[int, tuple[str, float]] = {}
        self._gone = False

    def capacity(self) -> Capacity:
        """Return what there is."""
        none = real_time() < self.orders.no_capacity_until
        return Capacity(0.0, 0.0, 0) if none else Capacity(self._cpus, 0.0, 1 << 40)

    def submit(self, call: TaskCall) -> int:
        """Start a call."""
        self._gate("submit")
        with self._changed:
            if self._gone:
                raise ExecutorError("faults: the executor is gone")
            handle = next(self._numbers)
            key = task_key(call.kind, call.version or 1, call.params, call.inputs)
            self._running[handle] = (key, real_time())
        threading.Thread(target=self._run, args=(handle, call), daemon=True, name="body").start()
        return handle

    def _run(self, handle: int, call: TaskCall) -> None:
        orders = self.orders
        with self._changed:
            fault = orders.faults.pop(0) if orders.faults else None
        finished = _execute(handle, call) if fault is None else Finished(handle, None, fault, "faults: as ordered")
        with self._changed:
            if finished.output is not None and orders.lost > 0:
                orders.lost -= 1
                finished = Finished(handle, None, Fault.INFRASTRUCTURE, "faults: the worker was lost")
            due = real_time()
            if orders.late > 0:
                orders.late -= 1
                due += orders.late_seconds
            self._ended(handle)
            self._ready.append((due, finished))
            if orders.twice > 0:
                orders.twice -= 1
                self._ready.append((due + 0.05, finished))
            self._changed.notify_all()

    def _ended(self, handle: int) -> None:
        """Note the end of a body, unless it was noted before."""
        if (begun := self._running.pop(handle, None)) is not None:
            self._bodies.append(Body(begun[0], self.owner, begun[1], real_time()))

    def wait(self, timeout: float) -> list[Finished]:
        """Return what ended."""
        self._gate("wait")
        deadline = real_time() + timeout
        with self._changed:
            while not self._gone:
                now = real_time()
                found = [finished for due, finished in self._ready if due <= now]
                if found or now >= deadline:
                    self._ready = [each for each in self._ready if each[0] > now]
                    return found
                self._changed.wait(min([deadline, *(due for due, _ in self._ready)]) - now)
        return []

    def cancel(self, handle: int) -> None:
        """Tell a body to stop; that it does not hear is no matter, as nobody hears of it."""
        with self._changed:
            self._ended(handle)

    def alive(self) -> bool:
        """Say whether it is there."""
        return not self._gone

    def lose(self) -> None:
        """Be gone, with all that runs."""
        with self._changed:
            self._gone = True
            for handle in list(self._running):
                self._ended(handle)
            self._ready.clear()
            self._changed.notify_all()

    def abandon(self) -> None:
        """Deliver nothing any more while bodies go on: what a killed scheduler leaves behind."""
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def shutdown(self) -> None:
        """Stop all that runs, if a scheduler that lives says so."""
        if not self._gone:
            self.lose()


def _execute(handle: int, call: TaskCall) -> Finished:
    """Run a call; a release is the digest of what it would be made of, as its own body needs a whole model."""
    if call.kind == "release":
        metrics: dict[str, Any] = {"artifact_bytes": 1, "metrics": METRICS, "seconds": 0.0}
        return Finished(handle, TaskOutput({ARTIFACT: artifact_of(call.inputs)}, metrics))
    runner = InProcess()
    runner.submit(call)
    (finished,) = runner.wait(0.0)
    return replace(finished, handle=handle)
