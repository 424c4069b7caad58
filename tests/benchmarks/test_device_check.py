"""The command for a machine with a GPU, tried out where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device_check import verdicts

ROOT = Path(__file__).parents[2]
SMALL = (
    *("sampler.num_inference_steps=2", "calibration.seeds=2", "evaluation.seeds=4", "evaluation.shard_seeds=4"),
    *("evaluation.sqnr_seeds=2", "evaluation.grid=2", "calibration.shard_seeds=2"),
)


def called(module: str, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Call a benchmark in a process of its own; return its exit code and what it wrote."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr
    return done.returncode, json.loads(out.read_text())


def test_a_stage_that_is_cut_leaves_the_file(tmp_path: Path) -> None:
    words = ("--device", "cpu", "--minutes", "0.01", "--stages", "jobs", "--recipes", "fast-w4a8")
    code, found = called("device_check", tmp_path / "check.json", *words)
    assert code == 1
    stage = found["stages"]["fast-w4a8 on cpu"]
    assert stage["cut"]
    assert stage["seconds"] < 60
    assert found["versions"]["torch"]


@pytest.mark.slow
def test_a_job_runs_without_a_cluster_and_again_with_the_same_bytes(tmp_path: Path) -> None:
    sets = [word for text in SMALL for word in ("--set", text)]
    words = ("--recipe", "minmax-w8a8", "--model", "examples/models/digits", "--device", "cpu", "--threads", "1", *sets)
    code, found = called("device_jobs", tmp_path / "job.json", *words)
    assert code == 0
    assert found["finished"]
    assert found["metrics"]["n"] == 4
    assert found["metrics"]["psnr_db"] > 20
    assert {"calibrate", "round", "pack", "evaluate", "score", "release"} <= found["kinds"].keys()
    assert all(again["same_bytes"] and again["functions"] for again in found["again"].values())


def test_verdicts_are_read_from_a_log_that_ends_anywhere(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[gw1] [  3%] PASSED tests/kernels/test_gemm.py::test_a[1-2] \n"
        "tests/kernels/test_gemm.py::test_b PASSED   [ 50%]\n"
        "[gw0] [  6%] FAILED tests/kernels/test_conv.py::test_c \ntests/kernels/test_conv.py::test_d"
    )
    assert verdicts(log) == {"passed": 2, "failed": ["tests/kernels/test_conv.py::test_c"]}
