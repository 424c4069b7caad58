from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DModel

import quant_core
from quant_core.artifact.folder import write_artifact
from quant_core.errors import ArtifactError
from quant_spec.formats import ModelFormat
from quant_spec.quantization_config import quantization_config
from quant_spec.tasks.release import Inputs, Origin, Params, ResolvedRecipe
from workers.errors import TaskError
from workers.execution.context import TaskContext
from workers.storage.manifest import pull_tree, put_manifest, put_tree, read_manifest
from workers.storage.store import open_cached
from workers.tasks import release

METRICS: dict[str, Any] = {
    "psnr_db": 33.25,
    "psnr_db_ci95": 0.5,
    "fd": 1.5,
    "fd_extractor": "efficientnet-lite0",
    "n": 256,
    "weight_bits_mean": 4.125,
    "act_bits_mean": 8.0,
    "bytes": 3 << 20,
    "bytes_fp16": 9 << 20,
    "bops": 1.0e9,
    "bops_fp32": 3.2e10,
    "sqnr_db_per_step": [30.0, 20.5],
    "sampler": {"scheduler": "DDIMScheduler", "num_inference_steps": 2, "eta": 0.0},
}
CONFIG = {
    "seed": 7,
    "calibration": {"first_seed": 100, "seeds": 4},
    "evaluation": {"first_seed": 0, "seeds": 2},
}
PARAMS = Params(
    model=Origin(name="tiny", class_name="UNet2DModel", source="hf:owner/tiny@abc"),
    recipe=ResolvedRecipe(name="fast-w4a8", digest="c" * 64, config=CONFIG),
)


@pytest.fixture
def context(tmp_path: Path) -> TaskContext:
    folders = [tmp_path / name for name in ("store", "cache", "scratch")]
    for folder in folders:
        folder.mkdir()
    store = open_cached(str(folders[0]), folders[1])
    return TaskContext(store=store, device="cpu", make_scratch=lambda: folders[2], threads=1)


def put_packed(context: TaskContext) -> str:
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    folder = context.scratch / "packed"
    config = quantization_config(ModelFormat({}, {}))
    scheduler = {"_class_name": "DDIMScheduler"}
    write_artifact(model, json.loads(model.to_json_string()), config, scheduler, folder)
    return put_tree(context.store, folder)


@pytest.fixture
def inputs(context: TaskContext) -> Inputs[str]:
    score = context.store.put_bytes(json.dumps(METRICS).encode())
    config = context.store.put_bytes(b"{}")
    model = put_manifest(context.store, {"denoiser/config.json": (config, 2)})
    return Inputs(packed=put_packed(context), score=score, model=model, calibration=("b" * 64, "d" * 64))


def test_the_artifact_holds_every_file_and_loads(context: TaskContext, inputs: Inputs[str], tmp_path: Path) -> None:
    done = release.run(PARAMS, inputs, context)
    assert set(done.outputs) == {"artifact"}
    assert done.metrics["metrics"] == METRICS
    manifest = read_manifest(context.store, done.outputs["artifact"])
    assert done.metrics["artifact_bytes"] == sum(entry["bytes"] for entry in manifest["files"].values())
    assert set(manifest["files"]) == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "recipe.json",
        "metrics.json",
        "provenance.json",
        "README.md",
    }
    packed = read_manifest(context.store, inputs.packed)["files"]
    assert all(manifest["files"][path] == entry for path, entry in packed.items())
    folder = tmp_path / "pulled"
    pull_tree(context.store, done.outputs["artifact"], folder)
    assert isinstance(quant_core.load_quantized(folder), UNet2DModel)
    assert json.loads((folder / "metrics.json").read_text()) == METRICS
    assert json.loads((folder / "recipe.json").read_text()) == CONFIG


def test_provenance_says_what_it_was_made_from(context: TaskContext, inputs: Inputs[str]) -> None:
    made = release.provenance(PARAMS, inputs)
    assert made["model"] == {"name": "tiny", "class_name": "UNet2DModel", "source": "hf:owner/tiny@abc"}
    assert made["inputs"] == {
        "packed": [inputs.packed],
        "score": [inputs.score],
        "calibration": ["b" * 64, "d" * 64],
        "model": [inputs.model],
    }
    assert made["recipe"] == {"name": "fast-w4a8", "digest": "c" * 64}
    assert made["seeds"] == {
        "recipe": 7,
        "calibration": {"first_seed": 100, "seeds": 4},
        "evaluation": {"first_seed": 0, "seeds": 2},
    }
    assert made["task_versions"]["release"] >= 1
    assert made["packages"]["torch"]
    assert "+" not in made["packages"]["torch"]


def test_the_card_names_the_hub_model(context: TaskContext, inputs: Inputs[str]) -> None:
    done = release.run(PARAMS, inputs, context)
    files = read_manifest(context.store, done.outputs["artifact"])["files"]
    card = context.store.get_bytes(files["README.md"]["sha256"]).decode()
    assert "base_model: owner/tiny\n" in card


def test_a_model_from_a_folder_goes_by_its_name(context: TaskContext, inputs: Inputs[str]) -> None:
    params = PARAMS.replaced(model=Origin(name="tiny", class_name="UNet2DModel", source=None))
    done = release.run(params, inputs, context)
    files = read_manifest(context.store, done.outputs["artifact"])["files"]
    assert "base_model: tiny\n" in context.store.get_bytes(files["README.md"]["sha256"]).decode()


def test_the_same_inputs_give_the_same_digest_wherever(
    context: TaskContext, inputs: Inputs[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = release.run(PARAMS, inputs, context)
    files = read_manifest(context.store, first.outputs["artifact"])["files"]
    texts = "".join(
        context.store.get_bytes(files[p]["sha256"]).decode() for p in files if not p.endswith(".safetensors")
    )
    assert socket.gethostname() not in texts
    assert str(tmp_path) not in texts
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.time", lambda: 0.0)
    monkeypatch.setitem(os.environ, "TZ", "Asia/Tokyo")
    config = {name: CONFIG[name] for name in reversed(CONFIG)}
    second = release.run(PARAMS.replaced(recipe=PARAMS.recipe.replaced(config=config)), inputs, context)
    assert first == second


def test_metrics_without_protocol_are_refused(context: TaskContext, inputs: Inputs[str]) -> None:
    bare = {name: value for name, value in METRICS.items() if name != "sampler"}
    inputs = replace(inputs, score=context.store.put_bytes(json.dumps(bare).encode()))
    before = {digest for digest, _, _ in context.store.list()}
    with pytest.raises(ArtifactError, match="got none of sampler; a figure is not stored without its protocol"):
        release.run(PARAMS, inputs, context)
    assert before == {digest for digest, _, _ in context.store.list()}


def test_bad_inputs_are_refused(context: TaskContext, inputs: Inputs[str]) -> None:
    (context.scratch / "odd").mkdir()
    (context.scratch / "odd" / "notes.txt").write_text("?")
    with pytest.raises(TaskError, match=r"packed tree: got notes.txt, wanted a config.json"):
        release.run(PARAMS, replace(inputs, packed=put_tree(context.store, context.scratch / "odd")), context)
    score = context.store.put_bytes(b"[1]")
    with pytest.raises(TaskError, match="got a JSON list, wanted an object of metrics"):
        release.run(PARAMS, replace(inputs, score=score), context)


def test_provenance_has_the_versions_of_the_passes_that_were_run(inputs: Inputs[str]) -> None:
    def versions(**config: Any) -> set[str]:
        params = PARAMS.replaced(recipe=PARAMS.recipe.replaced(config=CONFIG | config))
        return set(release.provenance(params, inputs)["task_versions"])

    plain = versions()
    assert versions(passes={"correct": None}, activations={"step_bits": None}) == plain
    assert versions(passes={"correct": {"scale": True}}) - plain == {"noise", "correct"}
    assert versions(activations={"step_bits": {"method": "joint"}}) - plain == {"step_effects", "step_bits"}
