"""The server of `tests.warm`: it imports nothing but the standard library until it is asked for the first process."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import tempfile
import traceback
from typing import Any


def serve(listener_number: int) -> None:
    """Fork a process for each request, one a connection, until standard input closes."""
    listener = socket.socket(fileno=listener_number)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    is_warm = False
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        if not is_warm:
            import_all()
            is_warm = True
        if os.fork() == 0:
            listener.close()
            answer_request(connection)
        connection.close()


def import_all() -> None:
    """Import what tasks and checks import."""
    import diffusers

    from quant_spec.kinds import KINDS
    from workers.execution.execute import load_body

    for kind in KINDS.values():
        load_body(kind)
    for name in ("UNet1DModel", "UNet2DModel", "UNet2DConditionModel", "DDIMScheduler"):
        getattr(diffusers, name)  # imported when they are asked for, with all that they need


def answer_request(connection: socket.socket) -> None:
    """Do what the other end asks for in this process, and end it; a connection without a request only wakes."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with connection.makefile("rwb") as stream:
            line = stream.readline()
            if line:
                request = json.loads(line)
                os.environ.clear()
                os.environ.update(request["environment"])
                os.chdir(request["folder"])
                if "arguments" in request:
                    stream.write(json.dumps({"pid": os.getpid()}).encode() + b"\n")
                    stream.flush()
                    sys.argv = ["-c", *request["arguments"]]
                answer = run_call(request["call"]) if "call" in request else run_code(request["code"])
                stream.write(json.dumps(answer).encode() + b"\n")
        connection.close()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run_call(call: dict[str, Any]) -> dict[str, Any]:
    """Run a task."""
    from workers.execution.execute import TaskCall
    from workers.execution.local import answer_call

    return answer_call(TaskCall(**call))


def run_code(code: str) -> dict[str, Any]:
    """Run code as a main module; return its exit status and what it printed."""
    status = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        except BaseException as error:
            traceback.print_exc()
            status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return {"returncode": status, "stdout": texts[0], "stderr": texts[1]}
