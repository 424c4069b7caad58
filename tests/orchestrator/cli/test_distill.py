"""Distillation whose steps count by their effect, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.orchestrator.conftest import Cli

RECIPE = """
extends: base
sampler: {num_inference_steps: 3}
calibration: {seeds: 2, shard_seeds: 2, batch_size: 4}
weights: {bits: 3}
activations: {bits: 4}
passes: {distill: {iterations: 3, batch_size: 2, seeds: 2, shard_seeds: 2, relations: false, rank: 2}}
evaluation: {seeds: 2, shard_seeds: 2, batch_size: 2, sqnr_seeds: 2, grid: 2}
"""


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_steps_count_by_their_measured_effect_if_a_recipe_asks_for_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(RECIPE)
    jobs = []
    for options in ((), ("--set", "passes.distill.effect=0.5")):
        answer = cli("run", tmp_path / "ours.yaml", "--model", "digits", "--json", *options)
        assert answer.code == 0, answer.err
        jobs.append(answer.json)
    logs = [cli("jobs", "logs", job["job"]).out for job in jobs]
    assert ["step_gains" in log for log in logs] == [False, True]
    assert jobs[0]["metrics"]["psnr_db"] != jobs[1]["metrics"]["psnr_db"]
