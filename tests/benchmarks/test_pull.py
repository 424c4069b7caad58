"""Pulling beside boto3: the benchmark itself, small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_pull_is_measured_beside_boto3(tmp_path: Path) -> None:
    out = tmp_path / "pull.json"
    command = [sys.executable, "-m", "benchmarks.pull", "--megabytes", "20", "--rounds", "1", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
    assert found["flat"]
    for size in ("whole", "tenth"):
        assert found[size]["ratio"] > 0
        assert {len(found[size][who]["rounds"]) for who in ("boto3", "quantmill")} == {1}
