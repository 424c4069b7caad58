"""What happened to a database, as seen from outside: every change of every row, in the order in which they were made.

A history is plain data, so that the checker is a pure function of it and can be tested with histories made by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """One row before and after a statement; None: it was not there.

    `seq` orders the changes of any one row, and of tasks of one key. `at` is the database's clock, in seconds since
    1970. `tx` is the transaction (None where the database does not number them; there they run one after the other).
    """

    seq: int
    at: float
    table: str
    before: Row | None
    after: Row | None
    tx: int | None = None

    @property
    def row(self) -> Row:
        """The row as it is now, or as it was before it was deleted."""
        found = self.after if self.after is not None else self.before
        assert found is not None
        return found

    @property
    def states(self) -> tuple[str | None, str | None]:
        """The row's state before and after."""
        return (self.before or {}).get("state"), (self.after or {}).get("state")

    def enters(self, state: str) -> bool:
        """Say whether the row came into a state."""
        before, after = self.states
        return after == state and before != state


@dataclass(frozen=True, slots=True)
class Logged:
    """One line of the service's own log of events."""

    id: int
    event: str
    job: str | None = None
    task: str | None = None
    attempt: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asked for and was told to be done: "submit", "cancel" or "retry" of a job."""

    what: str
    job: str


@dataclass(frozen=True, slots=True)
class Body:
    """One execution of a task's body for the scheduler `owner`. Times are as the database's.

    `ended` is when it returned or was told to stop, whichever came first.
    """

    key: str
    owner: str
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class History:
    """All that is known of a run.

    `sources` is which tasks each task reads; `wanted_by` which jobs hold it. `expected` is what an undisturbed run
    gives: outputs by key, and the artifact of each job. `damaged` lists digests of results whose bytes were not in the
    store at the end, or were others. `spoiled_again` are digests of blobs that were taken away more than once.
    """

    changes: tuple[Change, ...]
    log: tuple[Logged, ...] = ()
    sources: Mapping[str, frozenset[str]] = field(default_factory=dict)
    wanted_by: Mapping[str, frozenset[str]] = field(default_factory=dict)
    requests: tuple[Request, ...] = ()
    bodies: tuple[Body, ...] = ()
    expected_outputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    expected_artifacts: Mapping[str, str] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    spoiled_again: frozenset[str] = frozenset()

    def of(self, table: str) -> list[Change]:
        """Return the changes of one table, in order."""
        return [each for each in self.changes if each.table == table]
