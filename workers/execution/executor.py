"""Run tasks on Ray from a process that stays clear of it.

Ray ends the process that drives it when its own processes die, prints what it likes, and cannot always be shut down. So
the driver is a child (`workers.execution.remote`) that is told what to run in lines of JSON and can be killed and
started anew; whatever is killed, the orchestrator sees no more than a task that was lost. A local Ray lives in the
child's process group and dies with it, and the child dies when its standard input closes, so nothing outlives an
orchestrator.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from workers.errors import Dependency, ExecutorError, Fault
from workers.execution.cluster import Node, host_name
from workers.execution.context import TaskOutput
from workers.execution.execute import TaskCall
from workers.execution.local import python_path
from workers.execution.pulse import SILENCE_SECONDS, Watchdog
from workers.execution.ray_security import local_environment, session_folder, worker_environment
from workers.storage.locks import own_folder

# Ray's sockets lie in this folder, and a socket's path may have 107 characters at most.
_TEMPORARY = Path("/tmp")
_START_SECONDS = 120.0
_STOP_SECONDS = 5.0
_CHUNK_BYTES = 1 << 20

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Where Ray sets CUDA_VISIBLE_DEVICES, leave it empty for tasks without a GPU, and don't warn of a later default.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_DEDUP_LOGS": "0",
    # Workers see all GPUs and are told the number of theirs: a process may then use one after another.
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}
_LOCAL_ENVIRONMENT = {
    # With this name Ray switches off clusters of several machines, on any system: it binds to loopback addresses alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Workers stay in the process group that we kill.
    "RAY_process_group_cleanup_enabled": "0",
}


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a cluster has in all: CPUs, GPUs and bytes of memory; and its nodes, where they are known one by one."""

    cpus: float
    gpus: float
    memory_bytes: int
    nodes: tuple[Node, ...] = ()

    def node_list(self) -> tuple[Node, ...]:
        """Return the nodes; what is not known one by one is one node."""
        if self.nodes:
            return self.nodes
        return (Node("", host_name(), self.cpus, self.memory_bytes, int(self.gpus), cuda_ok=self.gpus > 0),)


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a call: its output, or its fault and one line about it.

    Of an outage also what is out, and of lost blobs their digests.
    """

    handle: int
    output: TaskOutput | None
    fault: Fault | None = None
    error: str = ""
    lost: tuple[str, ...] = ()
    dependency: Dependency | None = None


def finished_of(handle: int, answer: Mapping[str, Any]) -> Finished:
    """Return the end of a call from the JSON of `workers.execution.local.answer_call`."""
    if "error" not in answer:
        return Finished(handle, _output(answer))
    lost = (answer["lost"],) if "lost" in answer else ()
    named = answer.get("dependency")
    fault, dependency = Fault(answer["fault"]), Dependency(named) if named else None
    return Finished(handle, None, fault, answer["error"], lost, dependency)


class Executor(Protocol):
    """Runs calls; any number may be in flight."""

    def capacity(self) -> Capacity:
        """Return what there is to run calls with."""
        ...

    def submit(self, call: TaskCall) -> int:
        """Start a call, or queue it, and return its handle; raises ExecutorError if the executor is lost."""
        ...

    def wait(self, timeout: float) -> list[Finished]:
        """Return the calls that ended since the last time; wait up to `timeout` seconds for the first."""
        ...

    def cancel(self, handle: int) -> None:
        """Stop a call; its end is not reported, or reported as a fault."""
        ...

    def alive(self) -> bool:
        """Say whether the executor can still run and report calls; once it cannot, it never will again."""
        ...

    def shutdown(self) -> None:
        """Stop everything."""
        ...


def _output(message: Mapping[str, Any]) -> TaskOutput:
    return TaskOutput(message["outputs"], message["metrics"], message.get("ran", {}))


class RayExecutor:
    """Calls as Ray tasks, on a local Ray that lives as long as this object, or on a cluster."""

    def __init__(
        self,
        address: str | None,
        cpus: int | None,
        memory_bytes: int | None,
        gpus: int | None,
        timeout: float,
        silence_seconds: float,
    ) -> None:
        """Start the child and wait until it has a Ray; use `start`."""
        self._handles = itertools.count()
        self._finished: deque[Finished] = deque()
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._capacity: Capacity | None = None
        self._lost = False
        self._failure = ""
        self._address = address
        self._local = address is None
        self._resources = ExitStack()
        self._watchdog = Watchdog(silence_seconds, self._kill)
        try:
            folder = self._resources.enter_context(own_folder(_TEMPORARY, "quantmill-ray-"))
            self._log = folder / "driver.log"
            config = {
                "address": address,
                "cpus": cpus,
                "memory_bytes": memory_bytes,
                "gpus": gpus,
                "temporary": str(session_folder(folder)),
                "silence_seconds": silence_seconds,
            }
            self._process = self._spawn(folder, config)
            self._reader = threading.Thread(target=self._read, name="ray-answers", daemon=True)
            self._reader.start()
            self._wait_until_ready(timeout)
            self._watchdog.start()
        except BaseException:
            self.shutdown()
            raise

    @classmethod
    def start(
        cls,
        address: str | None = None,
        *,
        cpus: int | None = None,
        memory_bytes: int | None = None,
        gpus: int | None = None,
        timeout: float = _START_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> RayExecutor:
        """Start a local Ray, or connect to one.

        Parameters
        ----------
        address
            None or "local": start one on this machine, on the loopback address, without a dashboard. Otherwise the
            address of a running cluster ("auto", "host:port"), whose nodes must have this version of Quantmill.
        cpus, memory_bytes, gpus
            What a local Ray may use; all CPUs, most of the memory that is free and all GPUs by default.
        timeout
            Seconds to wait for it.
        silence_seconds
            How long a process may give no sign of life: a worker that is silent for longer is killed, and its call
            has failed; so is the driver, and the executor is lost.

        Raises
        ------
        ExecutorError
            If it does not start or cannot be reached.
        """
        where = None if address in (None, "", "local") else address
        return cls(where, cpus, memory_bytes, gpus, timeout, silence_seconds)

    def _spawn(self, folder: Path, config: dict[str, Any]) -> subprocess.Popen[bytes]:
        environment = worker_environment(os.environ) | _ENVIRONMENT | {"PYTHONPATH": python_path()}
        # Ray sets it to the CPUs of a task, in every worker, if it is not set.
        environment.pop("OMP_NUM_THREADS", None)
        # It would make `ray.init` connect instead of starting a Ray of our own.
        environment.pop("RAY_ADDRESS", None)
        if self._local:
            environment |= _LOCAL_ENVIRONMENT | local_environment()
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-c", "from workers.execution.remote import main; main()", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=folder,
                # A process group of its own: Ctrl-C in a terminal reaches us alone, and we can kill it whole.
                start_new_session=True,
            )

    def _wait_until_ready(self, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._capacity is not None or self._lost, timeout)
            if self._capacity is not None and not self._lost:
                return
        what = self._failure or self._last_words() or f"no answer within {timeout:.0f} s"
        wanted = "a local one to start" if self._local else f"a cluster at {self._address}"
        raise ExecutorError(f"ray: got {what}, wanted {wanted}")

    def _last_words(self) -> str:
        """Return the last line that a child wrote that has ended."""
        if not self._lost:
            return ""
        lines = self._log.read_text(errors="replace").strip().splitlines() or [""]
        return lines[-1].strip()[:300]

    def _read(self) -> None:
        """Take the child's messages until it ends."""
        assert self._process.stdout is not None
        try:
            with self._process.stdout as answers:
                rest = b""
                # All that has come at once, so that the scheduler records it at once.
                while chunk := answers.read1(_CHUNK_BYTES):  # type: ignore[attr-defined]
                    *lines, rest = (rest + chunk).split(b"\n")
                    # A child that is killed may leave half a line.
                    self._take([json.loads(line) for line in lines])
        finally:
            # Whatever the child left of a local Ray: a worker may not notice for a minute that it is alone.
            self._kill()
            # Also after an answer that cannot be read: nobody would take the next ones.
            with self._changed:
                self._lost = True
                self._changed.notify_all()

    def _take(self, messages: list[dict[str, Any]]) -> None:
        self._watchdog.hear()
        with self._changed:
            for message in messages:
                self._note(message)
            self._changed.notify_all()

    def _note(self, message: dict[str, Any]) -> None:
        if "capacity" in message:
            sums = message["capacity"]
            self._capacity = Capacity(**{**sums, "nodes": tuple(map(Node.from_json, sums["nodes"]))})
        elif "failed" in message:
            self._failure = message["failed"][:300]
        elif "id" in message:
            self._finished.append(finished_of(message["id"], message))

    def capacity(self) -> Capacity:
        """Return what the cluster has now."""
        assert self._capacity is not None, "an executor that started has a capacity"
        return self._capacity

    def submit(self, call: TaskCall) -> int:
        """Start a call; see `Executor`."""
        handle = next(self._handles)
        self._send({"submit": handle, "call": call.to_json()})
        return handle

    def wait(self, timeout: float) -> list[Finished]:
        """Return the calls that ended; returns at once when the executor is lost. See `Executor`."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished or self._lost, timeout)
            finished = list(self._finished)
            self._finished.clear()
        return finished

    def cancel(self, handle: int) -> None:
        """Stop a call, and the worker process that runs it; see `Executor`."""
        with suppress(ExecutorError):
            self._send({"cancel": handle})

    def alive(self) -> bool:
        """Say whether Ray and the child are there."""
        return not self._lost and not self._ended()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            with self._sending:
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise ExecutorError(f"ray: got a driver that is gone ({error}), wanted it to take a task") from error

    def _ended(self) -> bool:
        """Say whether the child has ended, without waiting for it: what it left is killed by its number."""
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _kill(self) -> None:
        """Kill the child, and all processes of a local Ray, also those that outlived the child."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                # Until it has been waited for, the number cannot be that of another group.
                os.killpg(self._process.pid, signal.SIGKILL)

    def shutdown(self) -> None:
        """Stop a local Ray and all its processes, or leave the cluster; see `Executor`."""
        self._watchdog.stop()
        process = getattr(self, "_process", None)
        if process is not None:
            with suppress(OSError, ValueError):
                process.stdin.close()
            if not self._local:
                self._reader.join(_STOP_SECONDS)
            self._kill()
            self._reader.join(_STOP_SECONDS)
            process.wait()
        self._resources.close()
