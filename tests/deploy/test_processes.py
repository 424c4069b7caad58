"""Processes that stand for services, in a process of their own, whose children they all are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deploy.compose import ROOT

#: A database, a schema that is made once, and a client that still needs the database when it is told to end.
SERVICES = """
import sys
from pathlib import Path
from deploy.compose import Service
from deploy.processes import Processes

folder = Path(sys.argv[1])
serve = f"trap 'echo database >> {folder}/ended; exit' INT; touch {folder}/open; while :; do sleep 0.05; done"
client = f"trap 'sleep 0.5; echo client >> {folder}/ended; exit' TERM; echo begun; while :; do sleep 0.05; done"
begun, done = "service_healthy", "service_completed_successfully"
check = ("test", "-e", f"{folder}/open")
services = [
    Service("database", ("sh", "-c", serve), {}, {}, check, restart=True, stop_signal="SIGINT"),
    Service("schema", ("true",), {}, {"database": begun}),
    Service("client", ("sh", "-c", client), {}, {"schema": done}, restart=True, ready="begun"),
]
processes = Processes({each.name: each for each in services}, folder)
processes.start(lambda: False)
processes.stop()
"""


def test_a_service_ends_before_what_it_needs(tmp_path: Path) -> None:
    """An orchestrator gives its tasks back to the database, which it needs by way of the schema alone."""
    done = subprocess.run([sys.executable, "-c", SERVICES, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ended").read_text(encoding="utf-8").split() == ["client", "database"]
