"""How long tasks of a kind take here, so that enough of the short ones are in flight.

Between a task's end and the next one's start lie a transaction and a way through Ray. With two tasks for each CPU in
flight, CPUs would wait where tasks take milliseconds. Of these, more are claimed: as many as take `AHEAD_SECONDS`
together.
"""

from __future__ import annotations

#: How much work, in seconds of one CPU, a claim takes ahead at most beyond what runs.
AHEAD_SECONDS = 0.1
#: The least that a task counts for, as a share of what it occupies.
LEAST_WEIGHT = 1 / 32
#: A kind whose tasks take less than this is brief: handing such a task to Ray by itself would take longer.
BRIEF_SECONDS = 0.02
_NEW = 0.2


class Pace:
    """Seconds of recent tasks by kind and version."""

    def __init__(self) -> None:
        """Know nothing: every kind counts as long."""
        self._seconds: dict[tuple[str, int], float] = {}

    def note(self, kind: str, version: int, seconds: float) -> None:
        """Learn from a task that ended well; a long one is believed at once, short ones by and by."""
        known = self._seconds.get((kind, version), AHEAD_SECONDS)
        self._seconds[kind, version] = max(seconds, known + _NEW * (seconds - known))

    def weight(self, kind: str, version: int) -> float:
        """Return the share of what a task occupies that it counts for while it is in flight, above 0 and at most 1."""
        return min(1.0, max(LEAST_WEIGHT, self._seconds.get((kind, version), AHEAD_SECONDS) / AHEAD_SECONDS))

    def is_brief(self, kind: str, version: int) -> bool:
        """Say whether tasks of a kind and version take milliseconds here."""
        return self._seconds.get((kind, version), AHEAD_SECONDS) < BRIEF_SECONDS
