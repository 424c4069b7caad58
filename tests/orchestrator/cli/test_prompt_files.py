"""What is said at submit of prompts files, and what jobs do with what their lines say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run_cli
from quant_spec.prompts import LONGEST_FILE
from tests.tiny_families import FAMILIES
from tests.tiny_pipelines import save_dit, save_sd

Cli = Callable[..., Any]
SMALL = {
    "sampler.num_inference_steps": "2",
    "calibration.seeds": "2",
    "evaluation.seeds": "2",
    "evaluation.sqnr_seeds": "1",
    "evaluation.grid": "2",
}
SET = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with three pipelines: told prompts, classes, and prompts without negative ones; to be copied."""
    folder = tmp_path_factory.mktemp("prompt-files")
    save_sd(folder / "sd")
    save_dit(folder / "dit")
    FAMILIES["lcm"].save(folder / "lcm")
    for name in ("sd", "dit", "lcm"):
        assert run_cli(["--home", str(folder / "home"), "models", "add", str(folder / name)]) == 0
    return folder / "home"


@pytest.fixture
def submit(registered: Path, home: Path, tmp_path: Path, cli: Cli) -> Callable[..., Any]:
    """Ask what a job with a prompts file would be."""
    shutil.copytree(registered, home)

    def ask(text: str, *words: str, model: str = "sd") -> Any:
        path = tmp_path / "told"
        path.write_text(text)
        return cli("submit", "minmax-w8a8", "--model", model, "--prompts", path, "--dry-run", *SET, *words)

    return ask


@pytest.mark.parametrize(
    ("model", "text", "words", "message"),
    [
        ("sd", "prompt,seed\nowl,1\nred heart,2\n", (), "got columns with commas between them (prompt,seed)"),
        ("sd", '[{"prompt": "owl"}]\n', (), "got a JSON array, wanted JSON lines"),
        ("sd", "prompt\tseed\nowl\t" + "9" * 6000 + "\n", (), ":2: got seed '999"),
        ("lcm", "prompt\tnegative_prompt\nowl\tugly\nred heart\t\n", (), "got negative_prompt in "),
        ("dit", "class_label\tnegative_prompt\n1\tugly\n2\t\n", (), "got negative_prompt in "),
        ("sd", "prompt\tsize\nowl\t64\nred heart\t64\n", ("--size", "32x48"), "got size 64x64 in "),
        ("sd", "owl\n", ("--set", "sampler.arguments={sigmas: [9.0, 1.0]}"), "got some for DDIMScheduler, which"),
        ("dit", "1\n", ("--size", "16"), "wanted what the call of model dit (DiTPipeline) takes: nothing besides"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused_at_submit(
    submit: Callable[..., Any], model: str, text: str, words: tuple[str, ...], message: str
) -> None:
    answer = submit(text, *words, model=model)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_files_that_would_not_fit_into_memory_are_refused(submit: Callable[..., Any], tmp_path: Path) -> None:
    answer = submit("a\n" * 1_100_000)
    assert (answer.code, answer.out) == (2, "")
    assert "got 1100000 lines, wanted at most 1000000" in answer.err
    answer = submit("\n" * LONGEST_FILE + "a")
    assert (answer.code, answer.out) == (2, "")
    assert f"got {LONGEST_FILE + 1} bytes, wanted at most {LONGEST_FILE}" in answer.err


def test_the_same_size_twice_and_a_seed_for_each_sample_are_fine(submit: Callable[..., Any]) -> None:
    text = "prompt\tsize\tseed\n" + "".join(f"owl\t64\t{seed}\n" for seed in range(4))
    assert submit(text, "--size", "64").code == 0


def test_samples_that_count_twice_are_told(submit: Callable[..., Any]) -> None:
    answer = submit("prompt\tseed\nowl\t1\nred heart\t2\n")
    assert answer.code == 0
    assert "prompts: 1 lines with seeds of their own are measured on 2 times" in answer.err


def test_what_is_measured_on_prompts_that_calibrate_says_so(submit: Callable[..., Any]) -> None:
    answer = submit("owl\nowl\ncat\nred heart\n")
    assert answer.code == 0
    assert "prompts: 1 of 2 lines that are measured on are among those that calibrate, too" in answer.err
    assert "prompts:" not in submit("owl\ncat\ncat, red\nred heart\n").err


def test_the_worst_samples_are_named_with_the_seeds_that_drew_them(
    submit: Callable[..., Any], cli: Cli, tmp_path: Path, without_ray: None
) -> None:
    (tmp_path / "told").write_text("prompt\tseed\na\t5\nb\t6\nc\t7\nd\t8\n")
    words = ("run", "minmax-w8a8", "--model", "sd", "--prompts", tmp_path / "told", *SET)
    assert cli(*words).code == 0
    metrics = cli("artifacts", "show", "sd-minmax-w8a8", "--json").json["metrics"]
    assert {(each["prompt"], each["seed"]) for each in metrics["worst_prompts"]} == {("b", 6), ("d", 8)}
    assert (metrics["shown_prompts"], metrics["shown_seeds"]) == (["b", "d"], [6, 8])


def test_a_call_that_does_not_take_what_it_is_told_fails_at_once(
    submit: Callable[..., Any], cli: Cli, without_ray: None
) -> None:
    answer = cli("run", "minmax-w8a8", "--model", "sd", "--size", "63", *SET, "--json")
    assert answer.code == 2
    assert "StableDiffusionPipeline: its call raised ValueError: `height` and `width` have to be" in answer.err
    assert "attempt=2" not in answer.err
