"""Searches over whole pipelines from the command line: gains are measured through a pipeline's own call."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cli.main import run_cli
from tests.orchestrator.in_process import InProcess
from tests.tiny_pipelines import save_dit, save_sd3

Cli = Callable[..., Any]

SPEC: dict[str, Any] = {
    "recipe": "minmax-w8a8",
    "set": {
        "sampler.num_inference_steps": 2,
        "sampler.guidance_scale": 4,
        "calibration.seeds": 2,
        "evaluation.seeds": 2,
        "evaluation.shard_seeds": 2,
        "evaluation.sqnr_seeds": 1,
        "evaluation.grid": 2,
    },
    "space": {"weight_bits": [4, 8], "per": "unit"},
    "screening": {"seeds": 2, "batch_size": 2},
    "effort": {"rounds": 1, "candidates": 2},
    "points": 2,
    "publish": 1,
    "baselines": False,
}


#: Of both kinds of pipeline: class labels with guidance and a learned variance, and prompts with flow matching.
PIPELINES = {"dit": save_dit, "sd3": save_sd3}


@pytest.fixture(scope="module", params=["dit", pytest.param("sd3", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> str:
    """The name of a pipeline."""
    return str(request.param)


@pytest.fixture(scope="module")
def searched(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home in which a search over a pipeline has gone through."""
    folder = tmp_path_factory.mktemp("pipelines")
    PIPELINES[model](folder / model)
    (folder / "one.yaml").write_text(yaml.safe_dump(SPEC | {"models": [model]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        assert run_cli(["--home", str(folder / "home"), "search", "run", str(folder / "one.yaml"), "--json"]) == 0
    return folder


@pytest.fixture
def done(searched: Path, home: Path) -> None:
    """The test's home, in which the search has gone through."""
    shutil.copytree(searched / "home", home)


@pytest.mark.usefixtures("done")
def test_each_pipeline_gets_a_front_that_was_measured_in_pixels(model: str, cli: Cli, tmp_path: Path) -> None:
    points = cli("search", "pareto", "one", "--json").json["models"][model]
    points = [point for point in points if point["on_front"]]
    assert points
    assert all(point["n"] == 2 for point in points)
    (release,) = {point["release"] for point in points if point["release"]}
    pulled = cli("artifacts", "pull", release, tmp_path / model)
    assert pulled.code == 0, pulled.err
    assert (tmp_path / model / "model_index.json").is_file(), "what is published is a pipeline"


@pytest.mark.usefixtures("done")
def test_choices_of_every_layer_are_priced_by_what_they_do_to_pixels(model: str, cli: Cli) -> None:
    layers = cli("search", "sensitivity", "one", "--json").json["models"][model]["tables"]["base"]["layers"]
    choices = [layer["weights"] for layer in layers.values() if len(layer["weights"]) > 1]
    damages = [choice["damage"] for widths in choices for choice in widths.values()]
    assert damages
    assert sum(damage > 0 for damage in damages) > 0.8 * len(damages)


@pytest.mark.usefixtures("done", "without_ray")
def test_bits_of_each_step_are_chosen_on_a_pipeline(model: str, cli: Cli) -> None:
    chosen = "{choices: [4, 8], target_mean: 6, seeds: 1, shard_seeds: 1, least_last: null}"
    sets = SPEC["set"] | {"activations.step_bits": chosen, "activations.mode": "per_step"}
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    answer = cli("run", "minmax-w8a8", "--model", model, *words, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["metrics"]["act_bits_mean"] < 8
