"""Processes that stand for the services of a compose file: started in order, watched, restarted, ended for good.

Whatever a service starts stays below this process: it adopts orphans, so that at the end nothing is left, and its
children end if it is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from deploy.compose import ROOT, Service

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_LOOK_SECONDS = 0.1
# A service that ends is started again after so long, doubled each time up to the limit.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
#: For a service to pass its check.
START_SECONDS = 120.0
#: A service that is to run for ever and ends before that is started so often: Ray gives a busy machine 30 s.
START_TRIES = 3


class StartError(Exception):
    """A service did not start; the message says which, and where its log is."""


class Processes:
    """The services of a compose file as processes, their output in `logs`."""

    def __init__(self, services: Mapping[str, Service], logs: Path) -> None:
        """Take these services; `start` begins."""
        self._services = services
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts: dict[str, tuple[float, float]] = {}
        self._checked: set[str] = set()

    def start(self, stopped: Callable[[], bool]) -> None:
        """Start all, each when what it waits for is there; returns when they pass their checks, or `stopped` says so.

        Raises
        ------
        StartError
            If one ends, or does not pass its check in time.
        """
        _adopt_orphans()
        self._logs.mkdir(parents=True, exist_ok=True)
        waiting = dict(self._services)
        while waiting and not stopped():
            ready = [each for each in waiting.values() if not set(each.after) & set(waiting)]
            if not ready:
                raise StartError(f"services: got {', '.join(waiting)} that wait for each other, wanted an order")
            for service in ready:
                for other, condition in service.after.items():
                    self._wait_for(self._services[other], condition, stopped)
                if stopped():
                    return
                self._spawn(service)
                if service.ready:
                    self._wait_for(service, "service_healthy", stopped)
                del waiting[service.name]
        for service in self._services.values():
            self._wait_for(service, "service_healthy" if service.restart else "service_completed_successfully", stopped)

    def watch(self) -> None:
        """Start again what has ended and is to run for ever; call it now and then."""
        for name, process in list(self._running.items()):
            service = self._services[name]
            if not service.restart or process.poll() is None:
                continue
            at, pause = self._restarts.get(name, (time.monotonic() + _FIRST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS))
            self._restarts[name] = (at, pause)
            if time.monotonic() >= at:
                say(f"{name} ended with status {process.returncode}; starting it again")
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                self._spawn(service)
                self._restarts[name] = (time.monotonic() + pause, pause)
        for child in psutil.Process().children():
            # Orphans that ended wait for us.
            if child.pid not in {each.pid for each in self._running.values()} and _is_zombie(child):
                with suppress(ChildProcessError):
                    os.waitpid(child.pid, os.WNOHANG)

    def stop(self) -> None:
        """End all, each when those that need it have ended, and whatever they left."""
        running = [self._services[name] for name, process in self._running.items() if process.poll() is None]
        while running:
            needed = {name for each in running for name in self._needs(each)}
            last = [each for each in running if each.name not in needed] or running
            self._end(last)
            running = [each for each in running if each not in last]
        left = psutil.Process().children(recursive=True)
        while left:
            for child in left:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(left, timeout=5)
            left = psutil.Process().children(recursive=True)

    def _needs(self, service: Service) -> set[str]:
        """Return what a service waited for, and what that did."""
        return set(service.after).union(*(self._needs(self._services[name]) for name in service.after))

    def _end(self, services: Sequence[Service]) -> None:
        """End some services, and kill those that take longer than they may."""
        for service in services:
            self._running[service.name].send_signal(signal.Signals[service.stop_signal])
        deadline = time.monotonic() + max(each.stop_seconds for each in services)
        for service in services:
            with suppress(subprocess.TimeoutExpired):
                self._running[service.name].wait(max(0.0, deadline - time.monotonic()))
        slow = [each.name for each in services if self._running[each.name].poll() is None]
        if slow:
            say(f"killing {', '.join(slow)}")
            for name in slow:
                self._running[name].kill()

    def pids(self) -> dict[str, int]:
        """Return the processes that run for ever, by service."""
        return {name: process.pid for name, process in self._running.items() if self._services[name].restart}

    def _spawn(self, service: Service) -> None:
        with (self._logs / f"{service.name}.log").open("ab") as log:
            self._running[service.name] = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=process_environment(service.environment),
                cwd=ROOT,
                # A group of its own: Ctrl-C reaches us alone, and we end the others in order.
                start_new_session=True,
                preexec_fn=_begin_child,
            )

    def _wait_for(self, service: Service, condition: str, stopped: Callable[[], bool]) -> None:
        process = self._running[service.name]
        log = f"see {self._logs / service.name}.log"
        deadline, tries = time.monotonic() + START_SECONDS, 1
        while not stopped():
            code = process.poll()
            if code is not None and service.restart and tries < START_TRIES and time.monotonic() < deadline:
                say(f"{service.name} ended with status {code}; starting it again")
                self._spawn(service)
                process, tries = self._running[service.name], tries + 1
                continue
            if condition == "service_completed_successfully" and code is not None:
                if code:
                    raise StartError(f"{service.name}: got exit status {code}, wanted 0; {log}")
                return
            if code is not None:
                raise StartError(f"{service.name}: got its end with status {code}, wanted it to run; {log}")
            if condition == "service_started" or (condition == "service_healthy" and self._is_healthy(service)):
                return
            if time.monotonic() > deadline:
                raise StartError(f"{service.name}: got no sign of life for {START_SECONDS:.0f} s, wanted one; {log}")
            time.sleep(_LOOK_SECONDS)

    def _is_healthy(self, service: Service) -> bool:
        """Run a service's check until it has passed once."""
        if service.name in self._checked:
            return True
        if service.ready and service.ready.encode() not in (self._logs / f"{service.name}.log").read_bytes():
            return False
        if not service.check:
            return True
        environment = process_environment(service.environment)
        null = subprocess.DEVNULL
        done = subprocess.run(
            service.check, env=environment, cwd=ROOT, check=False, stdin=null, stdout=null, stderr=null
        )
        passed = done.returncode == 0
        if passed:
            self._checked.add(service.name)
        return passed


def process_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a service: without our variables, as a container's, and with the programs of wheels."""
    ours = ("QUANTMILL", "RAY", "AWS", "PG", "POSTGRES")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # The programs of wheels lie beside Python, those of Postgres in its wheel.
    from deploy.postgres import postgres_programs

    folders = (str(Path(sys.executable).parent), str(postgres_programs()), inherited.get("PATH", os.defpath))
    paths = {"PATH": os.pathsep.join(folders), "PYTHONPATH": str(ROOT)}
    return inherited | paths | {"PYTHONUNBUFFERED": "1"} | dict(variables)


def say(message: str) -> None:
    """Write a line for the user."""
    print(message, file=sys.stderr, flush=True)


def _adopt_orphans() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _begin_child() -> None:
    """Let a child end with its parent, and hear SIGINT, which a shell that starts things aside has them ignore."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def names(services: Iterable[Service]) -> str:
    """Return services' names as a list for people."""
    return ", ".join(service.name for service in services)
