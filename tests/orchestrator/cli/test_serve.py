"""`quantmill serve` says why it ended, and a pipe that breaks ends no command in silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]

ROOT = Path(__file__).parents[3]


def start(home: Path, *words: str, **streams: Any) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("QUANTMILL", "RAY"))}
    command = [sys.executable, "-m", "orchestrator.cli", "--home", str(home), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(command, text=True, cwd=ROOT, env=environment, **pipes)


def closed_pipe() -> int:
    """Return the writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_draining_an_empty_queue_says_so(cli: Cli, home: Path) -> None:
    answer = cli("serve", "--drain", "--json")
    assert (answer.code, answer.json) == (0, {"drained": True, "executed": 0})
    first, last = answer.err.splitlines()
    assert first == f"serving sqlite:///{home}/quantmill.db, store {home}/store"
    assert last == "nothing queued: no job to execute"
    assert cli("serve", "--drain").out == ""


@pytest.mark.ray
@pytest.mark.parametrize(("words", "code"), [(["--drain"], 101), pytest.param([], 0, marks=pytest.mark.slow)])
def test_a_signal_while_ray_starts_is_no_drained_queue(
    cli: Cli, with_digits: Path, words: list[str], code: int
) -> None:
    job = cli("submit", "minmax-w8a8", "--model", "digits", "--json").json["job"]
    server = start(with_digits, "serve", *words)
    assert server.stderr is not None
    assert server.stderr.readline().startswith("serving ")
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=120)
    assert (server.returncode, out) == (code, "")
    assert err.splitlines()[-1].startswith("stopped by a signal: ")
    assert "unfinished jobs stay queued" in err
    assert cli("jobs", "show", job, "--json").json["state"] in ("queued", "running")


def test_messages_that_nobody_reads_stop_no_work(home: Path) -> None:
    writer = closed_pipe()
    server = start(home, "serve", "--drain", "--json", stderr=writer)
    os.close(writer)
    out, _ = server.communicate(timeout=60)
    assert (server.returncode, '"drained": true' in out) == (0, True)


def test_an_answer_that_nobody_reads_is_no_error(cli: Cli, home: Path) -> None:
    cli("init")
    writer = closed_pipe()
    command = start(home, "models", "ls", stdout=writer)
    os.close(writer)
    _, err = command.communicate(timeout=60)
    assert (command.returncode, err) == (0, "")


def test_another_pipe_that_breaks_is_a_fault(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        os.write(closed_pipe(), b"an order to a process that is gone")

    monkeypatch.setattr("orchestrator.cli.jobs.show_jobs", fail)
    answer = cli("jobs", "ls")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.splitlines()[-1].startswith("error: this is a fault of Quantmill: a pipe broke")
