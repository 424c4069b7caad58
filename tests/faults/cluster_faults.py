"""Faults of the second level: what happens to processes, servers and networks; see `faults.py`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from tests.faults.cluster import Cluster
from tests.faults.faults import Cancelled, Fault, Retried, Submitted
from tests.faults.proxy import Mode, Proxy
from tests.faults.serve import LEASE_SECONDS
from tests.faults.servers import end, freeze


def _seconds(dice: random.Random) -> float:
    """Draw a time, mostly longer than a lease."""
    return round(dice.uniform(0.5, 3.0) * LEASE_SECONDS, 1)


@dataclass(frozen=True, slots=True)
class ProcessKilled(Fault):
    """SIGKILL: an orchestrator (another takes its place), its driver of Ray, a Ray worker, or the node's raylet."""

    victim: str

    def apply(self, world: Cluster) -> None:
        """Kill."""
        if self.victim == "orchestrator":
            if (one := world.orchestrator()) is not None:
                end([one.process])
                world.start_orchestrator()
            return
        process = getattr(world, self.victim)()
        if process is not None:
            end([process])
        if self.victim == "raylet":
            world.later(LEASE_SECONDS, world.servers.start_ray)

    @classmethod
    def draw(cls, dice: random.Random) -> ProcessKilled:
        """Draw one."""
        return cls(dice.choice(("orchestrator", "orchestrator", "driver", "worker", "worker", "raylet")))


@dataclass(frozen=True, slots=True)
class OrchestratorStopped(Fault):
    """SIGSTOP of an orchestrator, alone or with its driver, and SIGCONT, mostly after its leases have run out."""

    seconds: float
    driver_too: bool

    def apply(self, world: Cluster) -> None:
        """Stop."""
        if (one := world.orchestrator()) is not None:
            world.stop_for(one.family() if self.driver_too else [one.process], self.seconds)

    @classmethod
    def draw(cls, dice: random.Random) -> OrchestratorStopped:
        """Draw one."""
        return cls(_seconds(dice), dice.random() < 0.5)


@dataclass(frozen=True, slots=True)
class PeerStopped(Fault):
    """SIGSTOP of a driver, a worker or a raylet that comes to itself after a while."""

    victim: str
    seconds: float

    def apply(self, world: Cluster) -> None:
        """Stop."""
        if (process := getattr(world, self.victim)()) is not None:
            world.stop_for([process], self.seconds)

    @classmethod
    def draw(cls, dice: random.Random) -> PeerStopped:
        """Draw one."""
        return cls(dice.choice(("driver", "worker", "raylet")), _seconds(dice))


@dataclass(frozen=True, slots=True)
class PeerHung(Fault):
    """SIGSTOP of a worker or a driver for good: its tasks must be taken away and run elsewhere."""

    needs: ClassVar[frozenset[str]] = frozenset({"heartbeats"})
    victim: str

    def apply(self, world: Cluster) -> None:
        """Stop."""
        if (process := getattr(world, self.victim)()) is not None:
            # Nothing thaws it, so that its tasks end only if they are taken away.
            freeze([process])

    @classmethod
    def draw(cls, dice: random.Random) -> PeerHung:
        """Draw one."""
        return cls(dice.choice(("worker", "driver")))


@dataclass(frozen=True, slots=True)
class HeadKilled(Fault):
    """All of Ray is killed, and comes back at another address when the faults end."""

    def apply(self, world: Cluster) -> None:
        """Kill."""
        if world.servers.head is not None:
            world.servers.head.kill()

    @classmethod
    def draw(cls, dice: random.Random) -> HeadKilled:
        """Draw one."""
        return cls()


@dataclass(frozen=True, slots=True)
class DatabaseServer(Fault):
    """Postgres is restarted, killed and started again, or stands still for a while."""

    only_waits: ClassVar[bool] = True
    how: str
    seconds: float

    def apply(self, world: Cluster) -> None:
        """Do it."""
        postgres = world.servers.postgres
        if self.how == "stopped":
            world.stop_for(postgres.processes(), self.seconds)
        else:
            postgres.restart(kill=self.how == "killed")

    @classmethod
    def draw(cls, dice: random.Random) -> DatabaseServer:
        """Draw one."""
        return cls(dice.choice(("restarted", "killed", "stopped")), _seconds(dice))


@dataclass(frozen=True, slots=True)
class DatabaseOut(Fault):
    """The way to the database is refused, or hangs, for a while."""

    only_waits: ClassVar[bool] = True
    mode: str
    seconds: float

    def apply(self, world: Cluster) -> None:
        """Begin."""
        _spoil(world, world.servers.database_proxy, Mode(self.mode), self.seconds)

    @classmethod
    def draw(cls, dice: random.Random) -> DatabaseOut:
        """Draw one."""
        return cls(dice.choice((Mode.REFUSE.value, Mode.HANG.value)), _seconds(dice))


@dataclass(frozen=True, slots=True)
class StoreServer(Fault):
    """The S3 server is killed and started again, or stands still for a while."""

    only_waits: ClassVar[bool] = True
    how: str
    seconds: float

    def apply(self, world: Cluster) -> None:
        """Do it."""
        server = world.servers.s3
        if self.how == "stopped":
            world.stop_for(server.family(), self.seconds)
        else:
            server.kill()
            world.later(self.seconds, lambda: None if server.alive else server.start())

    @classmethod
    def draw(cls, dice: random.Random) -> StoreServer:
        """Draw one."""
        return cls(dice.choice(("killed", "stopped")), _seconds(dice))


@dataclass(frozen=True, slots=True)
class StoreSpoiled(Fault):
    """The store refuses, hangs, answers 503, is full, cuts uploads, or gives other bytes, for a while."""

    only_waits: ClassVar[bool] = True
    mode: str
    seconds: float

    def apply(self, world: Cluster) -> None:
        """Begin."""
        _spoil(world, world.servers.store_proxy, Mode(self.mode), self.seconds)

    @classmethod
    def draw(cls, dice: random.Random) -> StoreSpoiled:
        """Draw one."""
        modes = (Mode.REFUSE, Mode.HANG, Mode.UNAVAILABLE, Mode.FULL, Mode.CUT, Mode.CORRUPT)
        return cls(dice.choice(modes).value, _seconds(dice))


@dataclass(frozen=True, slots=True)
class Partitioned(Fault):
    """The node is cut off for a while: from the head and from the store; nobody is told."""

    seconds: float

    def apply(self, world: Cluster) -> None:
        """Cut."""
        network = world.servers.network
        if network is not None:
            network.cut()
            world.later(self.seconds, network.mend)

    @classmethod
    def draw(cls, dice: random.Random) -> Partitioned:
        """Draw one."""
        return cls(_seconds(dice))


def _spoil(world: Cluster, proxy: Proxy, mode: Mode, seconds: float) -> None:
    proxy.set(mode, cut_after=600)
    world.later(seconds, lambda: proxy.set(Mode.PASS))


#: Each kind of fault and how often it is drawn, in proportion.
CLUSTER_FAULTS: dict[type[Fault], int] = {
    ProcessKilled: 6,
    OrchestratorStopped: 3,
    PeerStopped: 3,
    PeerHung: 2,
    HeadKilled: 1,
    DatabaseServer: 2,
    DatabaseOut: 2,
    StoreServer: 2,
    StoreSpoiled: 4,
    Partitioned: 2,
    Submitted: 4,
    Cancelled: 2,
    Retried: 1,
}
