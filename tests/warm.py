"""Processes for tasks that start at once: forked from one that has imported torch and diffusers already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from quant_spec.kinds import KINDS
from workers.execution.context import TaskOutput
from workers.execution.execute import TaskCall, load_body
from workers.execution.local import answer_call, read_answer

ROOT = Path(__file__).parents[1]


class WarmProcess:
    """Runs each call in a process of its own, as `run_in_subprocess` does, but for its start."""

    def __init__(self) -> None:
        """Start the process that others are forked from; it imports while this one goes on."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        code = "from tests.warm import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=pipe, stdout=pipe, env=environment, cwd=ROOT
        )

    def run(self, call: TaskCall) -> TaskOutput:
        """Run a call in a forked process, with this process's environment and folder of now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"call": call.to_json(), "environment": dict(os.environ), "folder": str(Path.cwd())}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return read_answer(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Fork a process for each request on standard input; its answer goes to standard output."""
    import diffusers

    for kind in KINDS.values():
        load_body(kind)
    for name in ("UNet1DModel", "UNet2DModel", "UNet2DConditionModel", "DDIMScheduler"):
        getattr(diffusers, name)  # imported when they are asked for, with all that they need

    answers = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print must not mix with the answers
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(json.loads(line), answers)
        _, status = os.waitpid(child, 0)
        if status != 0:
            lost: dict[str, Any] = {"error": f"process ended with status {status}", "fault": "task", "exit_code": 1}
            os.write(answers, json.dumps(lost).encode() + b"\n")


def _answer(request: dict[str, Any], answers: int) -> None:
    """Run a request in this process, and end it."""
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        answer = json.dumps(answer_call(TaskCall(**request["call"]))).encode() + b"\n"
        while answer:
            answer = answer[os.write(answers, answer) :]
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
