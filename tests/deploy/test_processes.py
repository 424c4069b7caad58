"""Processes that stand for services, in a process of their own, whose children they all are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deploy.compose import ROOT

BEGIN = """
import sys
from pathlib import Path
from deploy.compose import Service
from deploy.processes import Processes, StartError

folder = Path(sys.argv[1])
"""
#: A database, a schema that is made once, and a client that still needs the database when it is told to end.
NEEDED = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of what a shell starts aside
done = "service_completed_successfully"
serve = f"trap 'echo database >> {folder}/ended; exit' INT; touch {folder}/open; while :; do sleep 0.05; done"
client = f"trap 'sleep 0.5; echo client >> {folder}/ended; exit' TERM; echo begun; while :; do sleep 0.05; done"
check = ("test", "-e", f"{folder}/open")
services = [
    Service("database", ("sh", "-c", serve), {}, {}, check, restart=True, stop_signal="SIGINT"),
    Service("schema", ("true",), {}, {"database": "service_healthy"}),
    Service("client", ("sh", "-c", client), {}, {"schema": done}, restart=True, ready="begun"),
]
processes = Processes({each.name: each for each in services}, folder)
processes.start(lambda: False)
processes.stop()
"""
#: One that fails the first time, as Ray's head does on a busy machine; and one that always does.
FAILS = """
slow = f"echo x >> {folder}/tries; test $(wc -l < {folder}/tries) -ge 2 || exit 1; echo begun; sleep 60"
processes = Processes({"slow": Service("slow", ("sh", "-c", slow), {}, {}, restart=True, ready="begun")}, folder)
processes.start(lambda: False)
processes.stop()
processes = Processes({"bad": Service("bad", ("false",), {}, {}, ("false",), restart=True)}, folder)
try:
    processes.start(lambda: False)
except StartError as error:
    print(error)
"""


def run(script: str, folder: Path) -> str:
    """Run a script in a process of its own; return what it printed."""
    command = [sys.executable, "-c", BEGIN + script, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_service_ends_before_what_it_needs(tmp_path: Path) -> None:
    """An orchestrator gives its tasks back to the database, which it needs by way of the schema alone."""
    run(NEEDED, tmp_path)
    assert (tmp_path / "ended").read_text(encoding="utf-8").split() == ["client", "database"]


def test_a_service_that_ends_as_it_starts_is_started_again_but_not_for_ever(tmp_path: Path) -> None:
    assert "bad: got its end with status 1, wanted it to run" in run(FAILS, tmp_path)
    assert (tmp_path / "tries").read_text(encoding="utf-8").split() == ["x", "x"]
