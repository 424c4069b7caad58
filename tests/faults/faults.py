"""Faults of the first level: what can happen to schedulers, their executors, the database's connections and users.

Each is a record of what is done, drawn from a seed; `apply` does it. `needs` names the parts of the service without
which the fault costs more than it should ("lineage", "outages", "heartbeats"): such are drawn only when asked for.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tests.faults.executor import real_time
from tests.faults.graphs import GRAPHS
from tests.faults.member import MOMENTS, Member, Trap
from tests.faults.service import Service
from tests.faults.world import LEASE_SECONDS, World
from workers.errors import Fault as Sort

DATABASE_MOMENTS = ("statement", "before", "after")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong."""

    needs: ClassVar[frozenset[str]] = frozenset()
    postgres_only: ClassVar[bool] = False
    #: Whether the service only has to wait until it is over: nothing counts against a task.
    only_waits: ClassVar[bool] = False

    def apply(self, world: Any) -> None:
        """Let it go wrong."""
        raise NotImplementedError(f"{type(self).__name__}: got no way to apply it, wanted one")

    @classmethod
    def draw(cls, dice: random.Random) -> Fault:
        """Draw one."""
        raise NotImplementedError(f"{cls.__name__}: got no way to draw it, wanted one")

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"fault": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Killed(Fault):
    """A scheduler is killed at a moment, wherever its transaction is; another starts after a while, or none does."""

    moment: str
    skip: int
    another: bool

    def apply(self, world: World) -> None:
        """Kill one."""
        if (victim := world.victim()) is not None:
            victim.set_trap(Trap(self.moment, self.skip, victim.die))
            if self.another:
                world.add_member()

    @classmethod
    def draw(cls, dice: random.Random) -> Killed:
        """Draw one."""
        moment = dice.choice(MOMENTS)
        return cls(moment, dice.randrange(40 if moment == "statement" else 4), dice.random() < 0.8)


@dataclass(frozen=True, slots=True)
class Stopped(Fault):
    """A scheduler stands still at a moment, mostly for longer than its leases last, and then goes on as if nothing was.

    In mid-transaction it holds its locks meanwhile.
    """

    moment: str
    skip: int
    seconds: float

    def apply(self, world: World) -> None:
        """Stop one."""
        if (victim := world.victim()) is not None:
            seconds = self.seconds
            victim.set_trap(Trap(self.moment, self.skip, lambda: victim.stop(seconds)))

    @classmethod
    def draw(cls, dice: random.Random) -> Stopped:
        """Draw one."""
        moment = dice.choice((*MOMENTS, "anywhere"))
        seconds = round(dice.uniform(0.5, 2.0) * LEASE_SECONDS, 2)
        return cls(moment, dice.randrange(20 if moment == "statement" else 4), seconds)


@dataclass(frozen=True, slots=True)
class DatabaseFails(Fault):
    """Statements or commits of a scheduler fail; after a commit, what was committed stays and nobody was told."""

    moment: str
    skip: int
    count: int

    def apply(self, world: World) -> None:
        """Let one's statements fail."""
        if (victim := world.victim()) is not None:
            spring = victim.fail_statement if self.moment == "statement" else victim.fail
            victim.set_trap(Trap(self.moment, self.skip, spring, self.count))

    @classmethod
    def draw(cls, dice: random.Random) -> DatabaseFails:
        """Draw one."""
        moment = dice.choice(DATABASE_MOMENTS)
        return cls(moment, dice.randrange(40 if moment == "statement" else 5), dice.randint(1, 3))


@dataclass(frozen=True, slots=True)
class ConnectionsCut(Fault):
    """The server ends connections: one that is at work, or all."""

    postgres_only: ClassVar[bool] = True
    every: bool

    def apply(self, world: World) -> None:
        """Cut."""
        limit = "" if self.every else "LIMIT 1"
        mine = "datname = current_database() AND application_name = 'quantmill'"
        victims = f"SELECT pid FROM pg_stat_activity WHERE {mine} ORDER BY state, query_start DESC {limit}"
        world.recorder.query(f"SELECT pg_terminate_backend(pid) FROM ({victims}) AS victims")

    @classmethod
    def draw(cls, dice: random.Random) -> ConnectionsCut:
        """Draw one."""
        return cls(dice.random() < 0.5)


@dataclass(frozen=True, slots=True)
class ExecutorLost(Fault):
    """Ray is gone, with everything in flight."""

    def apply(self, world: World) -> None:
        """Lose one."""
        if (victim := world.victim()) is not None and victim.executor is not None:
            victim.executor.lose()

    @classmethod
    def draw(cls, dice: random.Random) -> ExecutorLost:
        """Draw one."""
        return cls()


@dataclass(frozen=True, slots=True)
class Misdelivered(Fault):
    """Results come late, twice, or are lost after their bytes were stored."""

    how: str
    count: int
    seconds: float

    def apply(self, world: World) -> None:
        """Give the order."""
        if (victim := world.victim()) is not None and victim.executor is not None:
            orders = victim.executor.orders
            if self.how == "late":
                orders.late_seconds = self.seconds
            setattr(orders, self.how, self.count)

    @classmethod
    def draw(cls, dice: random.Random) -> Misdelivered:
        """Draw one."""
        how = dice.choice(("late", "twice", "lost"))
        return cls(how, dice.randint(1, 4), round(dice.uniform(0.1, 2.0) * LEASE_SECONDS, 2))


@dataclass(frozen=True, slots=True)
class BodiesFail(Fault):
    """The next bodies of a scheduler fail, by their own or by the infrastructure's fault."""

    sort: str
    count: int

    def apply(self, world: World) -> None:
        """Give the order."""
        if (victim := world.victim()) is not None and victim.executor is not None:
            victim.executor.orders.faults += [Sort(self.sort)] * self.count

    @classmethod
    def draw(cls, dice: random.Random) -> BodiesFail:
        """Draw one."""
        return cls(dice.choice(("task", "infrastructure", "infrastructure")), dice.randint(1, 3))


@dataclass(frozen=True, slots=True)
class NoCapacity(Fault):
    """A cluster has no node for a while."""

    only_waits: ClassVar[bool] = True
    seconds: float

    def apply(self, world: World) -> None:
        """Take the nodes away."""
        if (victim := world.victim()) is not None and victim.executor is not None:
            victim.executor.orders.no_capacity_until = real_time() + self.seconds

    @classmethod
    def draw(cls, dice: random.Random) -> NoCapacity:
        """Draw one."""
        return cls(round(dice.uniform(0.1, 0.8), 2))


@dataclass(frozen=True, slots=True)
class ClockOff(Fault):
    """The clock of schedulers, workers and users is off by days for a while; the database's is not."""

    only_waits: ClassVar[bool] = True
    days: float

    def apply(self, world: World) -> None:
        """Set the clock."""
        world.set_clock(self.days * 86400.0)

    @classmethod
    def draw(cls, dice: random.Random) -> ClockOff:
        """Draw one."""
        return cls(round(dice.uniform(-30.0, 30.0), 2))


@dataclass(frozen=True, slots=True)
class Submitted(Fault):
    """A user submits a graph, or several do at once; one may be killed at a moment of it."""

    only_waits: ClassVar[bool] = True
    graph: int
    priority: int
    times: int
    dies: bool
    moment: str
    skip: int

    def apply(self, world: Service) -> None:
        """Submit."""
        graph, priority = world.graphs[self.graph % len(world.graphs)], self.priority
        for number in range(self.times):
            trap = Trap(self.moment, self.skip, lambda: None) if self.dies and number == 0 else None
            world.as_user(lambda hooked: world.submit(hooked, graph, priority), trap=trap)

    @classmethod
    def draw(cls, dice: random.Random) -> Submitted:
        """Draw one."""
        moment = dice.choice(DATABASE_MOMENTS)
        skip = dice.randrange(12) if moment == "statement" else 0
        times = dice.choice((1, 1, 1, 2, 3))
        return cls(dice.randrange(len(GRAPHS)), dice.randint(-1, 1), times, dice.random() < 0.25, moment, skip)


@dataclass(frozen=True, slots=True)
class Cancelled(Fault):
    """A user cancels a job, and may retry it at once."""

    only_waits: ClassVar[bool] = True
    retry: bool

    def apply(self, world: Service) -> None:
        """Cancel."""
        if (job := world.a_job()) is not None:
            acts = [lambda hooked: world.cancel(hooked, job), lambda hooked: world.retry(hooked, job)]
            world.as_user(*(acts if self.retry else acts[:1]))

    @classmethod
    def draw(cls, dice: random.Random) -> Cancelled:
        """Draw one."""
        return cls(dice.random() < 0.5)


@dataclass(frozen=True, slots=True)
class Retried(Fault):
    """A user retries a job."""

    only_waits: ClassVar[bool] = True

    def apply(self, world: Service) -> None:
        """Retry."""
        if (job := world.a_job()) is not None:
            world.as_user(lambda hooked: world.retry(hooked, job))

    @classmethod
    def draw(cls, dice: random.Random) -> Retried:
        """Draw one."""
        return cls()


@dataclass(frozen=True, slots=True)
class Joined(Fault):
    """Another scheduler joins, or one leaves as after SIGTERM."""

    leaves: bool

    def apply(self, world: World) -> None:
        """Join or leave."""
        victim: Member | None = world.victim() if self.leaves else None
        if victim is not None:
            victim.leave()
        else:
            world.add_member()

    @classmethod
    def draw(cls, dice: random.Random) -> Joined:
        """Draw one."""
        return cls(dice.random() < 0.6)


@dataclass(frozen=True, slots=True)
class BlobSpoiled(Fault):
    """A recorded blob is deleted, or its bytes change though its size does not."""

    needs: ClassVar[frozenset[str]] = frozenset({"lineage"})
    deleted: bool

    def apply(self, world: World) -> None:
        """Spoil one."""
        world.spoil_blob(deleted=self.deleted)

    @classmethod
    def draw(cls, dice: random.Random) -> BlobSpoiled:
        """Draw one."""
        return cls(dice.random() < 0.5)


@dataclass(frozen=True, slots=True)
class StoreOut(Fault):
    """The store is away for a while."""

    needs: ClassVar[frozenset[str]] = frozenset({"outages"})
    only_waits: ClassVar[bool] = True
    seconds: float

    def apply(self, world: World) -> None:
        """Take it away."""
        world.take_store(self.seconds)

    @classmethod
    def draw(cls, dice: random.Random) -> StoreOut:
        """Draw one."""
        return cls(round(dice.uniform(0.1, 1.0), 2))


#: Each kind of fault and how often it is drawn, in proportion.
FAULTS: dict[type[Fault], int] = {
    Killed: 4,
    Stopped: 4,
    DatabaseFails: 5,
    ConnectionsCut: 3,
    ExecutorLost: 2,
    Misdelivered: 4,
    BodiesFail: 3,
    NoCapacity: 1,
    ClockOff: 1,
    Submitted: 8,
    Cancelled: 3,
    Retried: 2,
    Joined: 1,
    BlobSpoiled: 3,
    StoreOut: 2,
}
