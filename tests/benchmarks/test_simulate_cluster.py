"""The model of a large cluster, where arithmetic says what must come out."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulate_cluster import Costs, Model, Orchestrator, Server

ROOT = Path(__file__).parents[2]


def busy(costs: Costs, *, gpus: int = 100, seconds: float = 1.0, orchestrators: int = 1) -> tuple[float, str]:
    """Return tasks a second, and what is the limit."""
    parts = [Orchestrator() for _ in range(orchestrators)]
    model = Model(gpus, seconds, parts, Server([0.0] * 4), costs, 5000, random.Random(0))
    figures = model.run()
    return figures["tasks_per_second"], figures["limit"]


def test_a_fast_queue_keeps_the_gpus_busy() -> None:
    rate, limit = busy(Costs(1e-4, 1e-4, 1e-4, 0.0, 0.0))
    assert limit == "gpus"
    assert rate == pytest.approx(100 / 1.04, rel=0.1)


@pytest.mark.parametrize("orchestrators", [1, 2])
def test_slow_orchestrators_are_the_limit_and_more_of_them_do_more(orchestrators: int) -> None:
    rate, limit = busy(Costs(0.05, 1e-4, 1e-4, 0.0, 0.0), orchestrators=orchestrators)
    assert limit == "orchestrators"
    assert rate == pytest.approx(20 * orchestrators, rel=0.05)


def test_a_slow_database_is_the_limit_however_many_orchestrators() -> None:
    rate, limit = busy(Costs(1e-4, 1e-4, 0.2, 0.0, 0.0), orchestrators=8)
    assert limit == "database"
    assert rate == pytest.approx(20, rel=0.05)


def test_the_command_reads_what_was_measured(tmp_path: Path) -> None:
    large = {"tasks_run": 100, "cpu_ms_a_task": {"orchestrator": 2.0, "ray driver": 1.0}}
    small = {"tasks_run": 10, "cpu_ms_a_task": {"orchestrator": 4.0, "ray driver": 4.0, "postgres": 3.0}}
    cases = [{"machine": "x", "database": "postgres", **each} for each in (large, small)]
    (tmp_path / "search-scale.json").write_text(json.dumps({"cases": cases}))
    words = ("--results", str(tmp_path), "--gpus", "16", "--seconds", "1", "--tasks", "500")
    command = [sys.executable, "-m", "benchmarks.simulate_cluster", *words]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    costs = {name: found["ms_a_task"][name] for name in ("orchestrator", "driver", "database")}
    assert costs == {"orchestrator": 2.0, "driver": 1.0, "database": 3.0}
    assert [case["orchestrators"] for case in found["cases"]] == [1, 4]
    assert found["placement"]["16 GPUs"]["ms_a_pass"] > 0
