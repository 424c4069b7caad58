"""The topology of docker-compose.yml as processes of one machine, without Docker: `python -m deploy.cluster`.

It reads that file, so commands, variables, ports and checks are the same. Only what containers bring is replaced:
hosts are 127.0.0.1, volumes are folders below --state, Postgres and rclone are the programs of their wheels, and
orchestrators share the head's Ray node. Ctrl-C ends all of it; the next start goes on with what is in --state.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import psutil

from deploy.compose import ROOT, Service, defaults, read_services
from deploy.processes import Processes, StartError, names, say
from deploy.secrets import make_secrets

#: What the client needs; a file of shell commands and one of JSON below --state.
CLIENT_SHELL, CLIENT_JSON = "client.sh", "cluster.json"
_PORTS = ("DATABASE_PORT", "STORE_PORT", "RAY_PORT", "RAY_DASHBOARD_PORT", "METRICS_PORT_1", "METRICS_PORT_2")
_MEMORY_SHARE = 0.35
_LOOPBACK = "127.0.0.1"
# Ray takes 127.0.0.1 for a mistake, and uses an address that others can reach in its place.
_RAY_LOOPBACK = "127.0.0.2"


def process_variables(state: Path, ray_folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the compose file that stand for containers, and those that were given.

    Parameters
    ----------
    state
        Holds data, secrets and logs.
    ray_folder
        For Ray's sockets, whose paths may have 107 characters at most.
    given
        Values of the user's environment; they win.
    """
    cpus = max(1, (os.cpu_count() or 1) // 2)
    memory = int(psutil.virtual_memory().available * _MEMORY_SHARE)
    here = {
        **dict.fromkeys(("BIND", "DATABASE_HOST", "STORE_HOST"), _LOOPBACK),
        **dict.fromkeys(("RAY_HOST", "RAY_NODE_IP"), _RAY_LOOPBACK),
        "RAY_NODE": "no",
        "RAY_DASHBOARD": "true" if importlib.util.find_spec("aiohttp_cors") else "false",
        "RAY_FOLDER": str(ray_folder),
        "SECRETS": str(state / "secrets"),
        "SECRETS_MOUNT": str(state / "secrets"),
        "QUANTMILL_DATA": str(state / "home"),
        "DATABASE_DATA": str(state / "postgres"),
        "STORE_DATA": str(state / "store"),
        "CPU_WORKER_CPUS": str(cpus),
        "GPU_WORKER_CPUS": str(cpus),
        "GPU_WORKER_GPUS": str(gpus()),
        "CPU_WORKER_MEMORY": str(memory),
        "GPU_WORKER_MEMORY": str(memory),
    }
    known = defaults()
    return here | {name: value for name, value in given.items() if name in known and value}


def gpus() -> int:
    """Return how many NVIDIA GPUs this machine has."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def free_ports() -> dict[str, str]:
    """Return a free port for each port of the compose file."""
    with ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in _PORTS}
        for each in sockets.values():
            each.bind(("127.0.0.1", 0))
        return {name: str(each.getsockname()[1]) for name, each in sockets.items()}


def taken_ports(variables: Mapping[str, str]) -> list[str]:
    """Return the ports that something else listens on, as NAME=port."""
    values = defaults() | dict(variables)
    taken = []
    for name in _PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", int(values[name])))
            except OSError:
                taken.append(f"{name}={values[name]}")
    return taken


def started_services(variables: Mapping[str, str]) -> dict[str, Service]:
    """Return the services that are started: all but the command line, which is the user's."""
    return {name: each for name, each in read_services(variables).items() if name != "cli"}


def write_client(state: Path, variables: Mapping[str, str]) -> None:
    """Write what a shell has to read so that `quantmill` works with this cluster."""
    environment = read_services(variables)["cli"].environment
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    (state / CLIENT_SHELL).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_state(state: Path, variables: Mapping[str, str], processes: Processes) -> None:
    """Write what a program has to know: the client's variables, ports, and processes by service."""
    ports = {name: int((defaults() | dict(variables))[name]) for name in _PORTS}
    environment = dict(read_services(variables)["cli"].environment)
    document = {"environment": environment, "ports": ports, "pids": processes.pids()}
    partial = state / f"{CLIENT_JSON}.partial"
    partial.write_text(json.dumps(document, indent=2), encoding="utf-8")
    partial.replace(state / CLIENT_JSON)


def run(state: Path, given: Mapping[str, str], stop: threading.Event) -> int:
    """Run the topology until `stop` is set; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="quantmill-cluster-", dir="/tmp") as ray_folder:
        variables = process_variables(state, Path(ray_folder), given)
        if taken := taken_ports(variables):
            say(f"ports: got {', '.join(taken)}, which are taken, wanted them free; set the variables, or --free-ports")
            return 2
        make_secrets(state / "secrets")
        services = started_services(variables)
        processes = Processes(services, state / "logs")
        try:
            say(f"starting {names(services.values())}; logs in {state / 'logs'}")
            processes.start(stop.is_set)
            write_client(state, variables)
            write_state(state, variables, processes)
            if not stop.is_set():
                say(
                    f"ready. In another shell: . {state / CLIENT_SHELL}; quantmill jobs ls. Ctrl-C here ends all of it."
                )
            while not stop.wait(0.5):
                before = processes.pids()
                processes.watch()
                if processes.pids() != before:
                    write_state(state, variables, processes)
        except StartError as error:
            say(f"error: {error}")
            return 1
        finally:
            say("stopping")
            processes.stop()
            (state / CLIENT_JSON).unlink(missing_ok=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the topology until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m deploy.cluster", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--state", type=Path, default=ROOT / ".quantmill" / "cluster", help="folder of data and logs")
    parser.add_argument("--free-ports", action="store_true", help="any free ports instead of the file's")
    options = parser.parse_args(arguments)
    state: Path = options.state.absolute()
    state.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handle)
    given = dict(os.environ) | (free_ports() if options.free_ports else {})
    return run(state, given, stop)


if __name__ == "__main__":
    sys.exit(main())
