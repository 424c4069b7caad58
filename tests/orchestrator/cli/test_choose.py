"""Weight bits chosen by measurement inside one recipe, from the command line to the packed file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run_cli
from tests.orchestrator.cli.test_search import write_model, write_spec
from tests.orchestrator.in_process import InProcess
from tests.tiny_pipelines import save_sd

Cli = Callable[..., Any]
SMALL = {
    "sampler.num_inference_steps": 2,
    "calibration.seeds": 2,
    "evaluation.seeds": 4,
    "evaluation.shard_seeds": 4,
    "evaluation.sqnr_seeds": 2,
    "evaluation.grid": 2,
    # The tiny model has no groups of 64 input channels.
    "weights": "{granularity: per_channel, group_size: null, group_scale: float}",
    "passes.round.positions": 4,
    # As searches measure.
    "passes.choose": "{path: 2, rows: 10}",
}
SET = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
MENU = "{weight_bits: [2, 3, 4, 6, 8]}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home in which a model was quantized with chosen bits, and as the recipe says."""
    folder = tmp_path_factory.mktemp("chosen")
    write_model(folder / "tiny", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        words = ["--home", str(folder / "home"), "run", "auto-w4a8", "--model", str(folder / "tiny"), *SET]
        words += ["--set", f"passes.menu={MENU}"]
        assert run_cli([*words, "--name", "chosen"]) == 0
        assert run_cli([*words, "--name", "plain", "--set", "passes.choose=null"]) == 0
    return folder


@pytest.fixture
def used(made: Path, home: Path) -> Path:
    """The test's home: a copy of that in which the jobs ran; the folder with the model."""
    shutil.copytree(made / "home", home)
    return made


def bits_of(cli: Cli, name: str) -> dict[str, Any]:
    found = cli("artifacts", "show", name, "--layers", "--json").json["layers"]
    return {each["layer"]: each["bits"]["weights"] for each in found}


def metrics_of(cli: Cli, name: str) -> dict[str, Any]:
    found: dict[str, Any] = cli("artifacts", "show", name, "--json").json["metrics"]
    return found


def test_bits_differ_by_layer_in_as_many_bytes_as_the_recipes_own(cli: Cli, used: Path) -> None:
    plain, chosen = metrics_of(cli, "plain"), metrics_of(cli, "chosen")
    assert set(bits_of(cli, "plain").values()) == {4, 8}
    bits = bits_of(cli, "chosen")
    assert len(set(bits.values())) > 2
    assert set(bits.values()) <= {2, 3, 4, 6, 8}
    # Widths differ in bytes for each of some layers, so that little of the budget is left.
    assert 0.97 * plain["bytes"] < chosen["bytes"] <= plain["bytes"]
    assert chosen["psnr_db"] > plain["psnr_db"]
    assert chosen["bops"] != plain["bops"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_a_smaller_budget_is_kept_and_shares_what_was_measured(cli: Cli, used: Path) -> None:
    words = ["run", "auto-w4a8", "--model", "tiny", *SET, "--set", f"passes.menu={MENU}", "--name", "smaller"]
    assert cli(*words, "--set", "passes.choose.weight_bits_mean=3").code == 0
    smaller = metrics_of(cli, "smaller")
    assert 2.5 < smaller["weight_bits_mean"] <= 3
    assert smaller["bytes"] < metrics_of(cli, "chosen")["bytes"]
    jobs = cli("jobs", "ls", "--json").json
    tasks = next(job["tasks"] for job in jobs if job["release"] == "smaller@1")
    # All but the choice, and what comes after: one of each.
    assert tasks["total"] - tasks["cached"] == len(["choose", "pack", "evaluate", "score", "release"])


def test_a_search_over_the_same_recipe_finds_the_tables_recorded(cli: Cli, used: Path) -> None:
    settings = {name: value for name, value in SMALL.items() if name.startswith(("sampler", "calibration", "ev"))}
    settings |= {"weights.granularity": "per_channel", "weights.group_size": None, "weights.group_scale": "float"}
    settings |= {"passes.round.positions": 4}
    space = {"weight_bits": [2, 3, 4, 6, 8]}
    spec = write_spec(used, "after", models=["tiny"], recipe="auto-w4a8", set=settings, space=space)
    found = cli("search", "run", spec, "--only", "sensitivity", "--dry-run", "--json")
    assert found.code == 0, found.err
    assert found.json["tasks"]["total"] - found.json["tasks"]["cached"] == 1  # propose


def test_a_plan_counts_what_will_be_measured(cli: Cli, used: Path) -> None:
    words = ["submit", "auto-w4a8", "--model", "tiny", *SET, "--set", f"passes.menu={MENU}", "--dry-run", "--json"]
    kinds = cli(*words).json["kinds"]
    assert kinds["choose"]["total"] == kinds["step_gains"]["total"] == 1
    assert kinds["sensitivity"]["total"] == kinds["menu"]["total"] >= 1
    assert not {"round", "mix"} & kinds.keys()
    assert all(kind["cached"] == kind["total"] for kind in kinds.values())


def test_the_report_has_each_layers_error_at_the_bits_that_it_got(cli: Cli, used: Path) -> None:
    job = next(job["job"] for job in cli("jobs", "ls", "--json").json if job["release"] == "chosen@1")
    assert cli("report", job, "--out", used / "report.html").code == 0
    page = (used / "report.html").read_text()
    rows = re.findall(r'<td class="name">([^<]+)</td>(.*?)</tr>', page, flags=re.DOTALL)
    shown = {name: re.findall(r'<td class="number">([^<]*)</td>', row) for name, row in rows}
    bits = bits_of(cli, "chosen")
    assert {name: float(cells[0]) for name, cells in shown.items() if name in bits} == bits
    assert all(float(shown[name][-1]) > 0 for name in bits)


def test_chosen_layers_read_differences_between_steps(cli: Cli, used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
    words = ["run", "auto-w4a8", "--model", "tiny", *SET, "--set", f"passes.menu={MENU}", "--name", "moving"]
    assert cli(*words, "--set", "passes.differences={least_gain_db: 0}").code == 0
    assert bits_of(cli, "moving") == bits_of(cli, "chosen")
    moving = metrics_of(cli, "moving")
    assert moving["difference_state_bytes"] > 0
    assert moving["act_bits_mean"] < metrics_of(cli, "chosen")["act_bits_mean"]


def test_bits_are_chosen_for_the_denoiser_of_a_whole_pipeline(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
    save_sd(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("red heart\nred apple\nowl\nblue car\n")
    words = ["run", "dmq-w4a8", "--model", tmp_path / "sd", "--prompts", tmp_path / "prompts.txt", *SET]
    words += ["--set", "sampler.guidance_scale=4", "--set", "passes.menu={weight_bits: [2, 4, 8]}", "--name", "chosen"]
    for left_out in ("passes.reconstruct=null", "passes.temporal=null", "passes.scale=null"):
        words += ["--set", left_out]
    done = cli(*words)
    assert done.code == 0, done.err
    assert len(set(bits_of(cli, "chosen").values())) > 2
    assert metrics_of(cli, "chosen")["samples"] == "pixels"


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("passes.choose.bytes=2kB", "passes.choose.bytes: got 2.0 kB, wanted more than"),
        ("passes.choose.weight_bits_mean=1.5", "passes.choose.weight_bits_mean: got 1.5, wanted 2 to 8"),
        ("passes.menu=null", "passes.choose: got it with passes.menu null"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_queued(cli: Cli, used: Path, override: str, message: str) -> None:
    before = cli("jobs", "ls", "--json").json
    words = ["--set", f"passes.menu={MENU}", "--set", override]
    refused = cli("run", "auto-w4a8", "--model", "tiny", *SET, *words)
    assert refused.code == 2
    assert message in refused.err
    assert cli("jobs", "ls", "--json").json == before


@pytest.mark.usefixtures("without_ray")
def test_bytes_below_what_the_file_needs_end_the_job_with_what_can_be_reached(cli: Cli, used: Path) -> None:
    words = ["--set", f"passes.menu={MENU}", "--set", "passes.choose.bytes=12kB"]
    failed = cli("run", "auto-w4a8", "--model", "tiny", *SET, *words, "--json")
    assert failed.code in (2, 100)
    assert re.search(r"passes\.choose\.bytes: got 12.0 kB, wanted .* which is what the choices reach", failed.err)


def test_the_recipe_shows_the_pass(cli: Cli) -> None:
    shown = cli("recipes", "show", "auto-w4a8", "--set", "passes.choose.bytes=2.8MB").out
    assert re.search(r"choose:\n\s+weight_bits_mean: null\n\s+bytes: 2800000", shown)
