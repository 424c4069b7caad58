"""Which scheduler samples from a model, as a user meets it: the model's own, or a named one that fits."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run_cli
from orchestrator.settings import resolve_settings
from workers.storage.manifest import read_manifest
from workers.storage.store import open_store

Cli = Callable[..., Any]
Snapshot = Callable[[], dict[str, bytes]]

#: The digits model with other schedulers of its own; None: with none.
SCHEDULERS: dict[str, dict[str, Any] | None] = {
    "solver": {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_schedule": "scaled_linear",
        "lambda_min_clipped": float("-inf"),  # as diffusers saves it
        "prediction_type": "v_prediction",
    },
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "bare": None,
}


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A home with these models registered, and one of a pipeline with a decoder; to be copied, not used."""
    from diffusers import VQModel

    folder = tmp_path_factory.mktemp("samplers")
    for name, config in SCHEDULERS.items():
        shutil.copytree(digits, folder / name)
        if config is None:
            shutil.rmtree(folder / name / "scheduler")
        else:
            (folder / name / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        assert run_cli(["--home", str(folder / "home"), "models", "add", str(folder / name)]) == 0
    shutil.copytree(digits, folder / "latent")
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}
    (folder / "latent" / "model_index.json").write_text(json.dumps(index))
    decoder = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=16)
    decoder.save_pretrained(folder / "latent" / "vqvae")
    assert run_cli(["--home", str(folder / "home"), "models", "add", str(folder / "latent")]) == 0
    return folder / "home"


@pytest.fixture
def models(home: Path, registered: Path) -> Path:
    """The test's home, with the models registered."""
    shutil.copytree(registered, home)
    return home


def refused(answer: Any) -> str:
    """Check for exit code 2, an empty stdout, and one line on stderr; return it."""
    assert (answer.code, answer.out) == (2, ""), answer
    (line,) = answer.err.strip().splitlines()
    assert line.startswith("error: sampler.")
    assert "wanted" in line
    return str(line)


def task_params(home: Path, kind: str) -> list[dict[str, Any]]:
    """Return the parameters of all queued tasks of a kind."""
    with sqlite3.connect(home / "quantmill.db") as connection:
        rows = connection.execute("SELECT params FROM tasks WHERE kind = ?", (kind,)).fetchall()
    connection.close()
    return [json.loads(row[0]) for row in rows]


@pytest.mark.parametrize(
    ("model", "scheduler"), [("solver", "DPMSolverMultistepScheduler"), ("latent", "DDIMScheduler")]
)
def test_a_recipes_sampler_is_the_models_own(cli: Cli, models: Path, model: str, scheduler: str) -> None:
    answer = cli("submit", "minmax-w8a8", "--model", model, "--json")
    assert answer.code == 0
    assert "sampler:" not in answer.err
    for kind in ("calibrate", "reference", "pack", "evaluate", "score"):
        assert {params["sampler"]["scheduler"] for params in task_params(models, kind)} == {scheduler}
    (release,) = task_params(models, "release")
    assert release["recipe"]["config"]["sampler"]["scheduler"] is None  # as the user wrote it


@pytest.mark.parametrize("how", [["--dry-run"], []])
def test_fields_that_the_models_config_lacks_are_said_once(cli: Cli, models: Path, how: list[str]) -> None:
    answer = cli("submit", "minmax-w8a8", "--model", "solver", "--set", "sampler.scheduler=DDIMScheduler", *how)
    assert answer.code == 0
    assert [line for line in answer.err.splitlines() if "sampler" in line] == [
        "sampler: DDIMScheduler instead of the model's DPMSolverMultistepScheduler: set_alpha_to_one=true, "
        "timestep_spacing=leading (from DDIMScheduler's defaults); clip_sample=false (nothing in the model's config "
        "clips)"
    ]


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("flow", ["scheduler=DDIMScheduler"], "got DDIMScheduler (diffusion) for a model of FlowMatchEulerDiscrete"),
        (
            "solver",
            ["scheduler=FlowMatchEulerDiscreteScheduler"],
            "got FlowMatchEulerDiscreteScheduler (flow matching)",
        ),
        ("solver", ["scheduler=EDMEulerScheduler"], "got EDMEulerScheduler (EDM) for a model of DPMSolverMultistep"),
        ("solver", ["scheduler=LCMScheduler"], "got LCMScheduler (latent consistency)"),
        ("solver", ["scheduler=UnCLIPScheduler"], "got UnCLIPScheduler for prediction_type=v_prediction"),
        ("solver", ["scheduler=DDIMSheduler"], "the nearest is DDIMScheduler"),
        ("solver", ["options={clip_samples: true}"], "got 'clip_samples'"),
        ("bare", [], "got null for a model without scheduler/scheduler_config.json"),
        ("bare", ["scheduler=DDIMScheduler"], "does not say num_train_timesteps, beta_start, beta_end, beta_schedule"),
    ],
)
@pytest.mark.parametrize("how", [["--dry-run"], []])
def test_a_scheduler_that_does_not_fit_is_refused(
    cli: Cli, models: Path, snapshot: Snapshot, model: str, settings: list[str], words: str, how: list[str]
) -> None:
    before = snapshot()
    changes = [word for setting in settings for word in ("--set", f"sampler.{setting}")]
    assert words in refused(cli("submit", "minmax-w8a8", "--model", model, *changes, *how))
    assert snapshot() == before


def test_a_model_without_a_scheduler_is_told_by_options(cli: Cli, models: Path) -> None:
    options = "{num_train_timesteps: 1000, beta_schedule: squaredcos_cap_v2, prediction_type: epsilon}"
    settings = ["--set", "sampler.scheduler=DDIMScheduler", "--set", f"sampler.options={options}"]
    answer = cli("submit", "minmax-w8a8", "--model", "bare", "--dry-run", *settings)
    assert answer.code == 0
    assert "sampler: DDIMScheduler for a model without a scheduler config: set_alpha_to_one=true" in answer.err


def test_samples_of_a_pipeline_with_a_decoder_are_latents(cli: Cli, models: Path, tmp_path: Path) -> None:
    shown = {name: cli("models", "show", name, "--json").json for name in ("latent", "solver")}
    assert shown["latent"]["inspection"]["samples"] == "latents"
    assert shown["solver"]["inspection"]["samples"] == "pixels"
    assert shown["latent"]["inspection"]["sample_shape"] == shown["solver"]["inspection"]["sample_shape"] == [1, 16, 16]
    assert cli("submit", "minmax-w8a8", "--model", "latent").code == 0
    for kind in ("evaluate", "score"):
        assert {params["samples"] for params in task_params(models, kind)} == {"latents"}
    (tmp_path / "alexnet.pth").write_bytes(b"weights")
    answer = cli("submit", "minmax-w8a8", "--model", "latent", "--set", f"evaluation.lpips={tmp_path / 'alexnet.pth'}")
    assert (answer.code, answer.out) == (2, "")
    assert "evaluation.lpips: got a model for latent, whose samples are latents, wanted null" in answer.err


def forget(home: Path, name: str, *keys: str) -> None:
    """Take entries out of a model's inspection, as if an older release had registered it."""
    with sqlite3.connect(home / "quantmill.db") as connection:
        (text,) = connection.execute("SELECT inspection FROM models WHERE name = ?", (name,)).fetchone()
        kept = {key: value for key, value in json.loads(text).items() if key not in keys}
        connection.execute("UPDATE models SET inspection = ? WHERE name = ?", (json.dumps(kept), name))
    connection.close()


def test_a_model_of_an_older_release_is_inspected_again(cli: Cli, models: Path) -> None:
    before = cli("models", "show", "solver", "--json").json
    forget(models, "solver", "scheduler", "samples")
    answer = cli("submit", "minmax-w8a8", "--model", "solver", "--dry-run")
    assert answer.code == 0
    assert "inspecting solver again: an older release registered it" in answer.err
    assert cli("models", "show", "solver", "--json").json != before, "a dry run changes nothing"
    assert cli("submit", "minmax-w8a8", "--model", "solver").code == 0
    assert cli("models", "show", "solver", "--json").json == before
    assert "inspecting" not in cli("submit", "minmax-w8a8", "--model", "solver", "--dry-run").err


def test_latents_that_an_older_release_took_for_pixels_are_refused(
    cli: Cli, models: Path, digits: Path, tmp_path: Path
) -> None:
    pipeline = shutil.copytree(digits, tmp_path / "old")
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"clip_sample": False}))
    assert cli("models", "add", pipeline, "--name", "old").code == 0
    forget(models, "old", "scheduler", "samples")
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    answer = cli("submit", "minmax-w8a8", "--model", "old", "--dry-run")
    assert answer.code == 2
    assert answer.err.strip() == (
        "error: model old: got a registration by an older release, which took its latents for pixels, wanted it added "
        f"again: quantmill models add {pipeline} --name ANOTHER"
    )


def test_only_what_decides_is_kept_of_a_pipeline(cli: Cli, models: Path) -> None:
    store = open_store(resolve_settings({}, home=str(models)).store_url)
    digest = cli("models", "show", "latent", "--json").json["digest"]
    kept = read_manifest(store, digest)["files"]["model_index.json"]["sha256"]
    assert json.loads(store.get_bytes(kept)) == {"vqvae": ["diffusers", "VQModel"]}


class TestRehearsal:
    """Samplers that give NaN whatever is predicted, or that cannot be set so, at submit."""

    @pytest.fixture
    def zero_signal(self, digits: Path, tmp_path: Path) -> Path:
        """A model whose own sampler divides by zero at its first step."""
        folder = Path(shutil.copytree(digits, tmp_path / "zero"))
        config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"clip_sample": False}))
        return folder

    @pytest.mark.parametrize("command", ["submit", "run", "dry run", "search"])
    def test_a_sampler_of_nan_is_refused_before_anything_is_queued(
        self, cli: Cli, zero_signal: Path, tmp_path: Path, command: str
    ) -> None:
        search = tmp_path / "search.yaml"
        search.write_text(f"name: s\nrecipe: fast-w4a8\nmodels: [{zero_signal}]\nbudgets: [{{bytes: 1MB}}]\n")
        words = {
            "submit": ("submit", "fast-w4a8", "--model", zero_signal),
            "run": ("run", "fast-w4a8", "--model", zero_signal),
            "dry run": ("submit", "fast-w4a8", "--model", zero_signal, "--dry-run"),
            "search": ("search", "submit", search),
        }[command]
        answer = cli(*words)
        assert (answer.code, answer.out) == (2, "")
        message = "sampler gives NaN or infinity at step 0 (timestep 999): DDIMScheduler makes it of any prediction"
        (line,) = (line for line in answer.err.splitlines() if line.startswith("error: "))
        assert message in line
        assert "sampler.options {rescale_betas_zero_snr: false}" in line
        assert cli("models", "ls", "--json").json == cli("jobs", "ls", "--json").json == []

    def test_options_that_mend_it_are_taken(self, cli: Cli, zero_signal: Path) -> None:
        words = ("--set", "sampler.options={timestep_spacing: leading}", "--dry-run")
        assert cli("submit", "fast-w4a8", "--model", zero_signal, *words).code == 0

    @pytest.mark.usefixtures("with_digits")
    def test_a_sampler_that_has_infinity_among_its_fields_is_rehearsed(self, cli: Cli) -> None:
        words = [*("--set", "sampler.scheduler=DPMSolverMultistepScheduler")]
        words += ["--set", "sampler.options={use_karras_sigmas: true}", "--dry-run"]
        # With more, the first timesteps are the same number, which that scheduler does not get through.
        words += ["--set", "sampler.num_inference_steps=2"]
        assert cli("submit", "fast-w4a8", "--model", "digits", *words).code == 0

    @pytest.mark.usefixtures("with_digits")
    @pytest.mark.parametrize(
        ("sampler", "message"),
        [
            (("num_inference_steps=2000",), "got DDIMScheduler for num_inference_steps=2000, which raised ValueError"),
            (
                ("scheduler=PNDMScheduler", "num_inference_steps=3"),
                "got PNDMScheduler for num_inference_steps=3, which raised ValueError",
            ),
        ],
    )
    def test_steps_that_a_scheduler_does_not_take_are_refused(
        self, cli: Cli, sampler: tuple[str, ...], message: str
    ) -> None:
        words = [word for each in sampler for word in ("--set", f"sampler.{each}")]
        answer = cli("submit", "fast-w4a8", "--model", "digits", *words)
        assert (answer.code, answer.out) == (2, "")
        assert message in answer.err.strip().splitlines()[-1]
        assert cli("jobs", "ls", "--json").json == []
