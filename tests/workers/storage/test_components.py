"""The components of whole pipelines, as folders have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from workers.errors import ModelError
from workers.storage.components import component_patterns, find_components
from workers.storage.manifest import read_files
from workers.storage.model_folder import import_model, model_digest
from workers.storage.store import Store

EMOJI_SD = Path(__file__).parents[3] / "examples" / "models" / "emoji-sd"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline's folder, to be changed."""
    return shutil.copytree(EMOJI_SD, tmp_path / "pipeline")


def change_index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_the_whole_tree_is_stored_under_its_own_names(folder_store: Store, pipeline: Path) -> None:
    record = import_model(folder_store, pipeline)
    files = read_files(folder_store, record.digest)
    assert record.left_out == ""
    assert set(files) == {
        *("model_index.json", "scheduler/scheduler_config.json"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    }


def test_a_variant_is_the_same_pipeline(folder_store: Store, pipeline: Path) -> None:
    plain = model_digest(pipeline)
    for name, stem in {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    }.items():
        (pipeline / name / f"{stem}.safetensors").rename(pipeline / name / f"{stem}.fp16.safetensors")
    assert model_digest(pipeline) == plain


@pytest.mark.parametrize("case", ["no index", "a component elsewhere", "conditioning beside it"])
def test_a_denoiser_alone_is_stored_as_before(folder_store: Store, pipeline: Path, case: str) -> None:
    if case == "no index":
        (pipeline / "model_index.json").unlink()
    elif case == "a component elsewhere":
        shutil.rmtree(pipeline / "vae")
    else:
        shutil.copyfile(pipeline / "text_encoder" / "model.safetensors", pipeline / "conditioning.safetensors")
    files = read_files(folder_store, import_model(folder_store, pipeline).digest)
    assert {path.partition("/")[0] for path in files} - {"conditioning.safetensors"} == {"denoiser", "scheduler"}


def test_a_component_of_another_library_is_refused(pipeline: Path) -> None:
    change_index(pipeline, vae=["os", "system"])
    with pytest.raises(
        ModelError, match=r"vae: got a component of 'os' \(system\), wanted one of diffusers, transformers"
    ):
        find_components(pipeline, "unet")


def test_pickled_weights_of_a_component_are_refused(folder_store: Store, pipeline: Path) -> None:
    (pipeline / "text_encoder" / "model.safetensors").rename(pipeline / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="weights as pickles only"):
        import_model(folder_store, pipeline)


def test_a_damaged_component_is_refused(folder_store: Store, pipeline: Path) -> None:
    path = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model.safetensors"):
        import_model(folder_store, pipeline)


def test_files_of_all_components_are_asked_for(pipeline: Path) -> None:
    here = sorted(path.relative_to(pipeline).as_posix() for path in pipeline.rglob("*") if path.is_file())
    wanted = [path for path in here if path.partition("/")[0] in ("vae", "text_encoder", "tokenizer")]
    more = ["vae/diffusion_pytorch_model.bin", "safety_checker/model.safetensors", "README.md"]
    found = list(filter_repo_objects([*here, *more], allow_patterns=component_patterns(pipeline, "unet")))
    assert found == wanted
