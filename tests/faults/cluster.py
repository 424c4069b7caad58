"""The second level: real processes. Orchestrators, a Ray head and a node, Postgres and S3 behind proxies."""

from __future__ import annotations

import random
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from tests.faults.graphs import PLAIN_GRAPHS
from tests.faults.proxy import Mode, Proxy
from tests.faults.servers import (
    KEY,
    SECRET,
    Postgres,
    Processes,
    end,
    environment,
    free_port,
    freeze,
    make_network,
    s3_server,
    thaw,
    wait_for_port,
)
from tests.faults.service import Service

_OBJECT_STORE_BYTES = 80 << 20
# Processes of Ray's own that are called like workers; their raylet ends with them.
_AGENTS = frozenset({"ray::DashboardAgent", "ray::RuntimeEnvAgent"})
#: The node's clock is off by so many days, always.
NODE_CLOCK_DAYS = 3.0


class Servers:
    """What schedules share, as it takes long to start: servers, proxies before them, and a Ray of two nodes.

    The second node is in a network of its own where this machine lets us make one, and its clock is off by days.
    """

    def __init__(self) -> None:
        """Start all of it."""
        self.stack = ExitStack()
        self._starting = threading.Lock()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="quantmill-faults-")))
        try:
            self.postgres = self.stack.enter_context(Postgres())
            self.network = make_network()
            if self.network is not None:
                self.stack.callback(self.network.close)
            self.host = self.network.here if self.network is not None else "127.0.0.1"
            self.s3, self.s3_port = s3_server(self.folder)
            self.stack.callback(lambda: self.s3.close())
            self.store_proxy = self.stack.enter_context(Proxy(("127.0.0.1", self.s3_port), self.host))
            self.database_proxy = self.stack.enter_context(Proxy(self.postgres.socket))
            self.variables = {
                "AWS_ENDPOINT_URL": f"http://{self.host}:{self.store_proxy.port}",
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            }
            self.ray_port = 0
            self._temporary: str | None = None
            self.head: Processes | None = None
            self.node: Processes | None = None
            self.stack.callback(self._end_ray)
            self.start_ray()
        except BaseException:
            self.close()
            raise

    def start_ray(self) -> None:
        """Start what of Ray is not there: all of it, if the head is gone."""
        with self._starting:
            self._start_ray()

    def _start_ray(self) -> None:
        if self.head is None or not self.head.alive:
            self._end_ray()
            self.ray_port = free_port()
            # Sockets lie below it, and their paths may not be long.
            self._temporary = tempfile.mkdtemp(prefix="qf-", dir="/tmp")
            words = [f"--port={self.ray_port}", "--head", "--include-dashboard=false", f"--temp-dir={self._temporary}"]
            self.head = Processes(self._ray(self.host, *words), self.folder / "head.log", environment(**self.variables))
            wait_for_port(self.host, self.ray_port, self.head)
            self.node = None
        if self.node is None or not self.node.alive:
            there = self.network.there if self.network is not None else self.host
            command = self._ray(there, f"--address={self.host}:{self.ray_port}")
            if self.network is not None:
                command = self.network.inside(command)
            clock = environment(NODE_CLOCK_DAYS, **self.variables)
            self.node = Processes(command, self.folder / "node.log", clock)

    def _ray(self, address: str, *words: str) -> list[str]:
        sizes = ["--num-cpus=2", f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats", "--block"]
        return [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={address}", *words, *sizes]

    def _end_ray(self) -> None:
        for each in (self.node, self.head):
            if each is not None:
                each.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def close(self) -> None:
        """End all of it."""
        self.stack.close()


class Cluster(Service):
    """One schedule's orchestrators, database and store on the shared servers."""

    silence_seconds = 150.0

    def __init__(self, servers: Servers, url: str, folder: Path, dice: random.Random, orchestrators: int) -> None:
        """Start so many orchestrators; the database at `url`, of the servers' Postgres, has the schema."""
        self.servers, self.folder = servers, folder
        self._name = url.partition("?")[0].rpartition("/")[2]
        blobs = servers.folder / "s3" / "blobs" / self._name
        super().__init__(url, blobs, dice, PLAIN_GRAPHS)
        self._wanted = orchestrators
        self._later: list[tuple[threading.Timer, Callable[[], None]]] = []
        self.orchestrators: list[Processes] = []
        for _ in range(orchestrators):
            self.start_orchestrator()

    def start_orchestrator(self) -> None:
        """Start another one."""
        servers = self.servers
        database = f"postgresql://postgres@127.0.0.1:{servers.database_proxy.port}/{self._name}"
        words = ["--home", str(self.folder / "home"), "--db", database, "--store", f"s3://blobs/{self._name}"]
        words += ["--ray", f"{servers.host}:{servers.ray_port}", "serve"]
        log = self.folder / f"serve-{len(self.orchestrators)}.log"
        command = [sys.executable, "-m", "tests.faults.serve", *words]
        self.orchestrators.append(Processes(command, log, environment(**servers.variables)))

    def orchestrator(self) -> Processes | None:
        """Return one that lives."""
        living = [each for each in self.orchestrators if each.alive]
        return self.dice.choice(living) if living else None

    def driver(self) -> psutil.Process | None:
        """Return a process that drives Ray for an orchestrator."""
        return self._choose(each for one in self.orchestrators for each in one.family()[1:])

    def worker(self) -> psutil.Process | None:
        """Return a Ray worker that runs a task, else one that waits for one."""
        family = [each for one in (self.servers.head, self.servers.node) if one is not None for each in one.family()]
        named = [(each, title) for each in family if (title := _title(each)) not in _AGENTS]
        running = [each for each, title in named if title.startswith("ray::") and "IDLE" not in title]
        return self._choose(running or [each for each, title in named if title.startswith("ray::")])

    def raylet(self) -> psutil.Process | None:
        """Return the node's raylet."""
        node = self.servers.node
        return self._choose(each for each in (node.family() if node is not None else ()) if _title(each) == "raylet")

    def _choose(self, found: Iterable[psutil.Process]) -> psutil.Process | None:
        living = list(found)
        return self.dice.choice(living) if living else None

    def later(self, seconds: float, undo: Callable[[], None]) -> None:
        """Undo something after a while, and at the latest when all faults end."""
        timer = threading.Timer(seconds, undo)
        timer.daemon = True
        timer.start()
        self._later.append((timer, undo))

    def stop_for(self, processes: list[psutil.Process], seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        freeze(processes)
        self.later(seconds, lambda: thaw(processes))

    def calm(self) -> None:
        """End all faults: what stands still goes on, what is gone comes back."""
        for timer, undo in self._later:
            timer.cancel()
            undo()
        self._later.clear()
        servers = self.servers
        servers.store_proxy.set(Mode.PASS)
        servers.database_proxy.set(Mode.PASS)
        servers.postgres.ensure()
        if not servers.s3.alive:
            servers.s3.start()
            wait_for_port("127.0.0.1", servers.s3_port, servers.s3)
        for thread in self.users:
            thread.join(self.silence_seconds)
        self.tend()

    def tend(self) -> None:
        """Start again what has ended, as a manager of processes does."""
        time.sleep(0.2)
        old = self.servers.ray_port
        self.servers.start_ray()
        if self.servers.ray_port != old:
            # They were told the address of a Ray that is gone for good.
            for each in self.orchestrators:
                each.close()
        while sum(each.alive for each in self.orchestrators) < self._wanted:
            self.start_orchestrator()

    def last_words(self) -> dict[str, str]:
        """Return the ends of the orchestrators' logs."""
        return {each.log.name: each.log.read_text(errors="replace")[-2000:] for each in self.orchestrators}

    def close(self) -> None:
        """End the orchestrators; the servers stay."""
        for timer, undo in self._later:
            timer.cancel()
            undo()
        for each in self.orchestrators:
            end(each.family())
        self.recorder.close()


def _title(process: psutil.Process) -> str:
    """Return what a process calls itself."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        words = process.cmdline()
        return words[0] if words and words[0].startswith("ray::") else process.name()
    return ""
