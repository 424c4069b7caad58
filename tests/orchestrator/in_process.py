"""An executor without Ray: it runs each task in the test's own process, at once."""

from __future__ import annotations

import itertools
from typing import Any

from workers.execution.execute import TaskCall
from workers.execution.executor import Capacity, Finished, finished_of
from workers.execution.local import answer_call


class InProcess:
    """Runs each call at once, here; its capacity is what `capacities` yields, and its last from then on."""

    def __init__(self, *capacities: Capacity) -> None:
        self._capacities = [*capacities, Capacity(2.0, 0.0, 1 << 40)]
        self._handles = itertools.count()
        self._finished: list[Finished] = []

    def capacity(self) -> Capacity:
        """Return the next capacity."""
        return self._capacities.pop(0) if len(self._capacities) > 1 else self._capacities[0]

    def submit(self, call: TaskCall) -> int:
        """Run a call."""
        handle = next(self._handles)
        self._finished.append(finished_of(handle, self.answer(call)))
        return handle

    def answer(self, call: TaskCall) -> dict[str, Any]:
        """Run a call to its end, and return what its worker would answer."""
        return answer_call(call)

    def wait(self, timeout: float) -> list[Finished]:
        """Return what ended."""
        finished, self._finished = self._finished, []
        return finished

    def cancel(self, handle: int) -> None:
        """Nothing is ever in flight."""

    def alive(self) -> bool:
        """It is."""
        return True

    def shutdown(self) -> None:
        """Nothing to stop."""
