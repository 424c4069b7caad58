"""Recipes of a pipeline's components, through the command line: a release that is a pipeline, text encoders packed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import quant_core  # noqa: F401  # registers the method
from orchestrator.cli.main import run_cli
from quant_core.nn.layers import QuantLayer
from tests.orchestrator.cli.test_pipelines import SET, difference
from tests.orchestrator.in_process import InProcess
from tests.tiny_pipelines import save_sd, save_sd3
from workers.storage.manifest import read_files
from workers.storage.store import open_store

Cli = Callable[..., Any]
PROMPTS = "red heart\nred apple\nowl\nblue car\n"
WORDS = [*SET, "--set", "evaluation.grid=3"]
RECIPE = """
sampler: {num_inference_steps: 3, guidance_scale: 4}
components:
  unet: minmax-w8a8
  text_encoder: {extends: weights-w8, weights: {bits: 4, granularity: per_group, group_size: 32}}
"""


def release(folder: Path, name: str, recipe: str) -> None:
    """Quantize the pipeline that lies in a folder, in a home in it; its release lies beside both."""
    (folder / "prompts.txt").write_text(PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        home = ["--home", str(folder / "home")]
        assert run_cli([*home, "models", "add", str(folder / name)]) == 0
        told = ["--prompts", str(folder / "prompts.txt"), "--out", str(folder / f"{name}-release")]
        assert run_cli([*home, "run", recipe, "--model", name, "--name", name, *told, *WORDS]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home with a release of a small pipeline, its text encoder packed."""
    folder = tmp_path_factory.mktemp("components")
    (folder / "mine.yaml").write_text(RECIPE)
    save_sd(folder / "sd")
    release(folder, "sd", str(folder / "mine.yaml"))
    return folder


@pytest.fixture
def used(made: Path, home: Path) -> Path:
    """The test's home: a copy of that in which the job ran; the folder of the release."""
    shutil.copytree(made / "home", home)
    return made


def draw(folder: Path, **more: Any) -> np.ndarray[Any, Any]:
    """Draw the sample of seed 0, as the evaluation did."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray[Any, Any] = pipeline(
        "red apple", num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
        output_type="np", **more,
    ).images[0]  # fmt: skip
    return images


def packed_layers(model: nn.Module) -> dict[str, QuantLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def held(model: nn.Module) -> int:
    """Return the bytes of a model's weights in memory."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_a_release_loads_with_its_text_encoder_packed_in_memory(made: Path) -> None:
    loaded, full = (DiffusionPipeline.from_pretrained(made / name) for name in ("sd-release", "sd"))
    layers = packed_layers(loaded.text_encoder)
    assert set(layers) == {n for n, m in full.text_encoder.named_modules() if isinstance(m, nn.Linear)}
    assert {layer.spec.weight.bits for layer in layers.values()} == {4}
    assert {layer.spec.weight.group_size for layer in layers.values()} == {32}
    linear = sum(m.weight.numel() for m in full.text_encoder.modules() if isinstance(m, nn.Linear))
    # float16 to 4 bits, with a scale of 16 bits and a zero point of 8 for 32 weights
    assert held(full.text_encoder) - held(loaded.text_encoder) > linear * (2 - 0.5 - 3 / 32) * 0.95
    assert {layer.spec.weight.bits for layer in packed_layers(loaded.unet).values()} == {8}
    assert not packed_layers(loaded.vae)


def test_what_was_measured_is_what_the_release_draws(made: Path) -> None:
    metrics = json.loads((made / "sd-release" / "metrics.json").read_text())
    expected = next(each["psnr_db"] for each in metrics["worst_prompts"] if each["seed"] == 0)
    image, reference = draw(made / "sd-release"), draw(made / "sd")
    assert -10 * np.log10(np.square(image - reference).mean()) == pytest.approx(expected, abs=0.05)
    # and it is the encoder's rounding, too, that was measured
    pipeline = DiffusionPipeline.from_pretrained(made / "sd-release", dtype=torch.float32)
    full = DiffusionPipeline.from_pretrained(made / "sd", dtype=torch.float32)
    pipeline.register_modules(text_encoder=full.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    other = pipeline(
        "red apple", num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]  # fmt: skip
    assert abs(-10 * np.log10(np.square(other - reference).mean()) - expected) > 0.1


@pytest.mark.slow
def test_all_text_encoders_of_a_pipeline_by_a_pattern(cli: Cli, home: Path, tmp_path: Path) -> None:
    save_sd3(tmp_path / "sd3")
    release(tmp_path, "sd3", "text-w8-svdquant-w4a8")
    assert home == tmp_path / "home"
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "sd3-release")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert {layer.spec.weight.bits for layer in packed_layers(getattr(loaded, name)).values()} == {8}
    assert {layer.spec.weight.bits for layer in packed_layers(loaded.transformer).values()} == {4, 8}
    store = open_store(str(home / "store"))
    released = read_files(store, cli("artifacts", "show", "sd3", "--json").json["digest"])
    (model,) = (row for row in cli("models", "ls", "--json").json if row["name"] == "sd3")
    original = read_files(store, model["digest"])
    packed = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    changed = {path for path, entry in original.items() if released.get(path) != entry}
    assert {path.partition("/")[0] for path in changed if path.endswith(".safetensors")} == set(packed)
    assert {path for path in original if path.startswith(("vae/", "tokenizer"))}.isdisjoint(changed)


def test_reports_tell_bytes_by_component(cli: Cli, used: Path, tmp_path: Path) -> None:
    metrics = cli("artifacts", "show", "sd", "--json").json["metrics"]
    sizes = metrics["component_bytes"]
    for name in ("text_encoder", "unet", "vae"):
        released, original = (
            sum(path.stat().st_size for path in (used / folder / name).glob("*.safetensors"))
            for folder in ("sd-release", "sd")
        )
        assert sizes[name] == {"bytes": released, "original": original}
    assert sizes["text_encoder"]["bytes"] < 0.75 * sizes["text_encoder"]["original"]
    assert sizes["vae"]["bytes"] == sizes["vae"]["original"]
    assert "weights by component" in (used / "sd-release" / "README.md").read_text()
    name = next(each["job"] for each in cli("jobs", "ls", "--json").json if each["model"] == "sd")
    assert cli("report", name, "--out", tmp_path / "report.html").code == 0
    assert "text_encoder" in (tmp_path / "report.html").read_text()


def test_provenance_names_the_kinds_that_made_the_encoders(made: Path) -> None:
    provenance = json.loads((made / "sd-release" / "provenance.json").read_text())
    assert {"text_encoder", "components"} <= provenance["task_versions"].keys()
    recipe = json.loads((made / "sd-release" / "recipe.json").read_text())
    assert recipe["components"]["unet"]["recipe"] == "minmax-w8a8"
    assert recipe["components"]["text_encoder"]["weights"]["bits"] == 4


def test_a_release_is_saved_and_loaded_again(made: Path, tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(made / "sd-release", dtype=torch.float32).save_pretrained(tmp_path / "again")
    assert difference(draw(tmp_path / "again"), draw(made / "sd-release")) == 0


def test_an_export_without_quantization_has_plain_text_encoders(cli: Cli, used: Path, tmp_path: Path) -> None:
    answer = cli("artifacts", "export", "sd", "--out", tmp_path / "out", "--format", "dequantized")
    assert answer.code == 0, answer.err
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    packed = DiffusionPipeline.from_pretrained(used / "sd-release", dtype=torch.float32)
    assert not packed_layers(plain.text_encoder)
    ids = torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = plain.text_encoder(ids)[0], packed.text_encoder(ids)[0]
    assert float((one - other).norm() / other.norm()) < 2e-3


@pytest.fixture
def sd3(cli: Cli, tmp_path: Path) -> None:
    """A pipeline with three text encoders, registered in the test's home."""
    save_sd3(tmp_path / "sd3")
    assert cli("models", "add", tmp_path / "sd3").code == 0


@pytest.mark.usefixtures("sd3")
def test_models_add_says_which_components_a_recipe_may_name(cli: Cli) -> None:
    answer = cli("models", "show", "sd3")
    lines = {line.split()[0]: line for line in answer.out.splitlines() if line}
    assert lines["text_encoder_3"].endswith("as it is, unless components.text_encoder_3")
    assert lines["vae"].endswith("as it is")


@pytest.mark.usefixtures("sd3")
def test_a_dry_run_shows_formats_and_memory_by_component(cli: Cli) -> None:
    words = ["submit", "minmax-w8a8", "--model", "sd3", "--set", "components.text_encoder_3=weights-w4", "--dry-run"]
    found = cli(*words, "--json").json
    formats = {part["name"]: part["format"] for part in found["components"]}
    assert (formats["transformer"], formats["text_encoder_3"]) == ("W8A8", "W4")
    assert formats["text_encoder"] is None
    assert formats["vae"] is None
    assert set(found["component_memory_bytes"]) == {"denoiser", "prompts", "text_encoder_3"}
    assert found["kinds"]["text_encoder"]["total"] == 1
    assert found["kinds"]["encode"]["total"] == 3
    text = {line.split()[0]: line for line in cli(*words).out.splitlines() if line}
    assert " W4 " in text["text_encoder_3"]
    assert "as it is" in text["vae"]


def test_recipes_that_differ_in_the_encoder_share_all_else(cli: Cli, used: Path) -> None:
    words = ["submit", str(used / "mine.yaml"), "--model", "sd", "--prompts", used / "prompts.txt", *WORDS]
    kinds = cli(*words, "--set", "components.text_encoder.weights.bits=8", "--dry-run", "--json").json["kinds"]
    left = {name for name, kind in kinds.items() if kind["cached"] < kind["total"]}
    assert left == {"text_encoder", "components", "encode", "evaluate", "score", "release"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["components.text_encodr=weights-w8"], "components: got text_encodr, wanted components of model sd"),
        (["components.transformer=weights-w8"], "components: got transformer, wanted components of model sd"),
        (["components.vae=weights-w8"], "components.vae: got weights-w8 for AutoencoderKL, which stays in full"),
        (["components.scheduler=weights-w8"], "components.scheduler: got weights-w8 for DDIMScheduler, which stays"),
        (["components.text_encoder=fast-w4a8"], "components.text_encoder: got fast-w4a8, which quantizes activations"),
        (["components.text_encoder={}"], "components.text_encoder: got no weights, wanted a recipe"),
        (["components.text_encoder=nowhere"], "recipe: got 'nowhere', wanted a file or a shipped recipe"),
        (["components.unet.weights.bits=4"], "components.unet: got weights or passes for the denoiser"),
        (["components=weights-w8"], "components: got 'weights-w8', wanted a mapping of components to recipes"),
        (["components.unet=text-w8-svdquant-w4a8"], "components.unet: got text-w8-svdquant-w4a8, which has components"),
    ],
)
def test_components_that_do_not_fit_are_refused(cli: Cli, used: Path, words: list[str], message: str) -> None:
    before = len(cli("jobs", "ls", "--json").json)
    told = [word for each in words for word in ("--set", each)]
    answer = cli("submit", "minmax-w8a8", "--model", "sd", *told)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert len(cli("jobs", "ls", "--json").json) == before


def test_a_file_says_the_denoisers_method_once(cli: Cli, used: Path, tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("components: {unet: minmax-w8a8}\nweights: {bits: 4}\n")
    answer = cli("submit", tmp_path / "twice.yaml", "--model", "sd")
    assert (answer.code, answer.out) == (2, "")
    assert "weights: got it beside components.unet" in answer.err


def test_components_of_a_bare_denoiser_are_refused(cli: Cli, with_digits: Path) -> None:
    answer = cli("submit", "text-w8-svdquant-w4a8", "--model", "digits")
    assert (answer.code, answer.out) == (2, "")
    assert "components: got text_encoder* for model digits, a bare denoiser" in answer.err
