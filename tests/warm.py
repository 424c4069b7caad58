"""Processes that start at once: forked from one, the same for a whole test run, that has imported torch already."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from workers.execution.context import TaskOutput
from workers.execution.execute import TaskCall
from workers.execution.local import read_answer

ROOT = Path(__file__).parents[1]


class WarmServer:
    """The process that others are forked from; it imports when somebody first asks for one."""

    def __init__(self) -> None:
        """Start it; it ends when its standard input closes, at the latest with this process."""
        self._folder = Path(tempfile.mkdtemp(prefix="quantmill-warm-"))
        self.address = str(self._folder / "socket")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(64)
            number = listener.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from tests.warm_server import serve; serve({number})"],
                stdin=subprocess.PIPE, env=environment, cwd=ROOT, pass_fds=[number],
            )  # fmt: skip

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder)


class Warm:
    """Runs calls and code in processes of their own, with this process's environment and folder of now."""

    def __init__(self, address: str) -> None:
        """Name a server, and let it begin to import; that goes on while this process does."""
        self._address = address
        with self._connected():
            pass

    def run(self, call: TaskCall) -> TaskOutput:
        """Run a call, as `run_in_subprocess` does."""
        return read_answer(self._ask({"call": call.to_json()}))

    def run_python(self, code: str, seconds: float) -> subprocess.CompletedProcess[str]:
        """Run code, as `orchestrator.actions.probe` does, but with much imported."""
        return subprocess.CompletedProcess([code], **self._ask({"code": code}))

    def start_python(self, code: str, arguments: Sequence[str]) -> psutil.Process:
        """Start code as a main module with these arguments, in a process to be killed; what it prints goes nowhere."""
        connection = self._send({"code": code, "arguments": list(arguments)})
        with connection, connection.makefile("rb") as stream:
            return psutil.Process(json.loads(stream.readline())["pid"])

    def _connected(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(self._address)
        except OSError:
            connection.close()
            raise
        return connection

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._send(request) as connection, connection.makefile("rb") as stream:
            line = stream.readline()
        if not line:
            return {"error": "process ended without an answer", "fault": "task", "exit_code": 1}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _send(self, request: dict[str, Any]) -> socket.socket:
        """Ask for something; return where the answer comes."""
        request |= {"environment": dict(os.environ), "folder": str(Path.cwd())}
        connection = self._connected()
        connection.sendall(json.dumps(request).encode() + b"\n")
        return connection
