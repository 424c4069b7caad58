"""Model folders: what is found, what is refused, and what a model's digest depends on."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save_file

from workers.errors import ModelError
from workers.storage.manifest import pull_tree, read_manifest
from workers.storage.model_folder import check_model, find_model, import_model, resolve_source
from workers.storage.store import NodeStore

ROOT = Path(__file__).parents[3]
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = {"_class_name": "UNet2DModel", "sample_size": 8}
SCHEDULER = {"_class_name": "DDIMScheduler"}
TENSORS: dict[str, Any] = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.bias": np.ones(5, dtype=np.float16),
}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Write a safetensors file with dtypes that numpy does not have."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small pipeline's folder."""
    folder = tmp_path / "model"
    write_json(folder / "unet" / "config.json", CONFIG)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    save_file(TENSORS, folder / "unet" / WEIGHTS)
    return folder


def refuse(store: NodeStore, folder: Path, reason: str) -> None:
    """Check that a folder is refused with one line and exit code 2, and that nothing was stored."""
    with pytest.raises(ModelError, match=reason) as caught:
        import_model(store, folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert "wanted" in str(caught.value)
    assert list(store.list()) == []


def test_model_becomes_a_tree_with_fixed_paths(model: Path, folder_store: NodeStore, tmp_path: Path) -> None:
    record = import_model(folder_store, model)
    manifest = read_manifest(folder_store, record.digest)
    assert set(manifest["files"]) == {
        "denoiser/config.json",
        f"denoiser/{WEIGHTS}",
        "scheduler/scheduler_config.json",
    }
    assert record.class_name == "UNet2DModel"
    assert record.parameters == 17
    assert record.bytes == sum(entry["bytes"] for entry in manifest["files"].values())
    pull_tree(folder_store, record.digest, tmp_path / "out")
    assert (tmp_path / "out" / "denoiser" / WEIGHTS).read_bytes() == (model / "unet" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["emoji32", "digits"])
def test_shipped_models_are_accepted(name: str, folder_store: NodeStore) -> None:
    record = import_model(folder_store, ROOT / "examples" / "models" / name)
    assert record.class_name == "UNet2DModel"
    assert record.parameters > 100_000


def test_same_content_elsewhere_has_the_same_digest(model: Path, folder_store: NodeStore, tmp_path: Path) -> None:
    digest = import_model(folder_store, model).digest
    moved = tmp_path / "elsewhere" / "transformer"
    shutil.copytree(model / "unet", moved)
    shutil.copytree(model / "scheduler", moved.parent / "scheduler")
    (moved / WEIGHTS).rename(moved / "model.safetensors")
    write_json(moved / "config.json", {"sample_size": 8, "_name_or_path": "/home/me", "_class_name": "UNet2DModel"})
    assert import_model(folder_store, moved.parent).digest == digest
    # The denoiser's own folder, with the scheduler beside it.
    assert import_model(folder_store, moved).digest == digest


@pytest.mark.parametrize("change", ["config", "weights", "scheduler", "conditioning"])
def test_what_changes_the_model_changes_its_digest(model: Path, folder_store: NodeStore, change: str) -> None:
    digest = import_model(folder_store, model).digest
    if change == "config":
        write_json(model / "unet" / "config.json", CONFIG | {"sample_size": 16})
    elif change == "weights":
        save_file(TENSORS | {"b.bias": np.zeros(5, dtype=np.float16)}, model / "unet" / WEIGHTS)
    elif change == "scheduler":
        write_json(model / "scheduler" / "scheduler_config.json", SCHEDULER | {"steps_offset": 1})
    else:
        save_file({"prompt": np.ones(3, dtype=np.float32)}, model / "conditioning.safetensors")
    assert import_model(folder_store, model).digest != digest


def test_only_weights_values_leave_a_models_form_as_it_is(model: Path, folder_store: NodeStore) -> None:
    form = import_model(folder_store, model).form
    save_file({name: tensor + 1 for name, tensor in TENSORS.items()}, model / "unet" / WEIGHTS)
    assert import_model(folder_store, model).form == form
    save_file(TENSORS | {"b.bias": np.zeros(6, dtype=np.float16)}, model / "unet" / WEIGHTS)
    assert import_model(folder_store, model).form != form
    save_file(TENSORS, model / "unet" / WEIGHTS)
    write_json(model / "unet" / "config.json", CONFIG | {"sample_size": 16})
    assert import_model(folder_store, model).form != form


def shard(folder: Path) -> None:
    """Split the weights in two, with an index."""
    (folder / WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, tensor in zip(names, TENSORS, strict=True):
        save_file({tensor: TENSORS[tensor]}, folder / name)
    write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {}, "weight_map": dict(zip(TENSORS, names, strict=True))})


def test_sharded_weights_are_kept_with_their_index(model: Path, folder_store: NodeStore) -> None:
    shard(model / "unet")
    record = import_model(folder_store, model)
    assert record.parameters == 17
    files = read_manifest(folder_store, record.digest)["files"]
    assert sum(name.endswith(".safetensors") for name in files) == 2
    assert f"denoiser/{WEIGHTS}.index.json" in files


def test_missing_shard_is_refused(model: Path, folder_store: NodeStore) -> None:
    shard(model / "unet")
    next((model / "unet").glob("*-00002-of-*")).unlink()
    refuse(folder_store, model, "00002-of-00002")


def test_index_that_points_outside_is_refused(model: Path, folder_store: NodeStore) -> None:
    shard(model / "unet")
    save_file(TENSORS, model / WEIGHTS)
    write_json(model / "unet" / f"{WEIGHTS}.index.json", {"weight_map": {"a": f"../{WEIGHTS}"}})
    refuse(folder_store, model, "which is not in the folder")


def test_folder_that_is_not_there_is_refused(folder_store: NodeStore, tmp_path: Path) -> None:
    refuse(folder_store, tmp_path / "nowhere", "not a folder")


def test_model_without_config_is_refused(model: Path, folder_store: NodeStore) -> None:
    (model / "unet" / "config.json").unlink()
    refuse(folder_store, model, r"no config\.json")


def test_config_that_is_not_json_is_refused(model: Path, folder_store: NodeStore) -> None:
    (model / "unet" / "config.json").write_text("{")
    refuse(folder_store, model, "not JSON")


def test_scheduler_config_without_class_is_refused(model: Path, folder_store: NodeStore) -> None:
    write_json(model / "scheduler" / "scheduler_config.json", {})
    refuse(folder_store, model, "no _class_name")


def test_quantized_model_is_refused(model: Path, folder_store: NodeStore) -> None:
    write_json(model / "unet" / "config.json", CONFIG | {"quantization_config": {"quant_method": "quantmill"}})
    refuse(folder_store, model, "quantized")


def test_model_without_weights_is_refused(model: Path, folder_store: NodeStore) -> None:
    (model / "unet" / WEIGHTS).unlink()
    refuse(folder_store, model, "no weights")


def test_weights_without_tensors_are_refused(model: Path, folder_store: NodeStore) -> None:
    save_file({}, model / "unet" / WEIGHTS)
    refuse(folder_store, model, "without a tensor")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_pickles_alone_are_refused(model: Path, folder_store: NodeStore, name: str) -> None:
    (model / "unet" / WEIGHTS).rename(model / "unet" / name)
    refuse(folder_store, model, "pickles")


def test_several_files_without_an_index_are_refused(model: Path, folder_store: NodeStore) -> None:
    (model / "unet" / WEIGHTS).rename(model / "unet" / "one.safetensors")
    save_file(TENSORS, model / "unet" / "two.safetensors")
    refuse(folder_store, model, "several")


@pytest.mark.parametrize("kept", [0, 4, 8, 50, -1])
def test_truncated_weights_are_refused(model: Path, folder_store: NodeStore, kept: int) -> None:
    path = model / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refuse(folder_store, model, "truncated")


def test_trailing_bytes_are_refused(model: Path, folder_store: NodeStore) -> None:
    path = model / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes() + b"more")
    refuse(folder_store, model, "as the header says")


def test_header_that_contradicts_itself_is_refused(model: Path, folder_store: NodeStore) -> None:
    write_raw(model / "unet" / WEIGHTS, {"a": ("F32", [3], b"\0" * 8)})
    refuse(folder_store, model, "header")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_weights_that_are_not_finite_are_refused_by_name(
    model: Path, folder_store: NodeStore, dtype: type, value: float
) -> None:
    bad: Any = np.ones((3, 4), dtype=dtype)
    bad[1, 2] = value
    save_file(TENSORS | {"bad.weight": bad}, model / "unet" / WEIGHTS)
    refuse(folder_store, model, r"1 of 12 values NaN or infinite in bad\.weight")


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("BF16", b"\xc0\x7f"),  # NaN
        ("BF16", b"\x80\x7f"),  # infinity
        ("BF16", b"\x80\xff"),  # minus infinity
        ("F8_E4M3", b"\x7f"),  # NaN; the format has no infinity
        ("F8_E4M3", b"\xff"),
        ("F8_E5M2", b"\x7c"),  # infinity
        ("F8_E5M2", b"\xfd"),  # NaN
    ],
)
def test_short_floats_that_are_not_finite_are_refused(
    model: Path, folder_store: NodeStore, dtype: str, bits: bytes
) -> None:
    write_raw(model / "unet" / WEIGHTS, {"bad": (dtype, [3], bits + b"\0" * 2 * len(bits))})
    refuse(folder_store, model, "1 of 3 values NaN or infinite in bad")


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("BF16", b"\x7f\x7f"), ("BF16", b"\x7f\xff"), ("F8_E4M3", b"\x7e"), ("F8_E5M2", b"\x7b"), ("I8", b"\xff")],
)
def test_largest_finite_values_are_accepted(model: Path, dtype: str, bits: bytes) -> None:
    write_raw(model / "unet" / WEIGHTS, {"fine": (dtype, [2], bits * 2)})
    assert check_model(find_model(model)) == 2


def test_conditioning_must_be_finite_too(model: Path, folder_store: NodeStore) -> None:
    save_file({"prompt": np.array([np.nan], dtype=np.float32)}, model / "conditioning.safetensors")
    refuse(folder_store, model, "prompt")


def test_folder_source_is_itself(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path


@pytest.fixture
def hub_cache(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one repository, and no network."""
    repository = tmp_path / "hub" / "models--someone--small"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / commit


@pytest.mark.parametrize("source", ["hf:someone/small", "hf:someone/small@main"])
def test_hub_model_resolves_to_its_snapshot(hub_cache: Path, folder_store: NodeStore, model: Path, source: str) -> None:
    folder = resolve_source(source)
    assert folder == hub_cache
    assert import_model(folder_store, folder).digest == import_model(folder_store, model).digest


@pytest.mark.parametrize("source", ["hf:someone/other", "hf:someone/small@nope", "hf:a/b/c", "hf:"])
def test_hub_model_that_cannot_be_had_is_named(hub_cache: Path, source: str) -> None:
    with pytest.raises(ModelError, match="wanted hf:owner/name") as caught:
        resolve_source(source)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("channels", "components", "kept"),
    [
        (3, {"vqvae": ["diffusers", "VQModel"]}, True),
        (1, {"vae": ["diffusers", "AutoencoderKL"]}, True),
        (4, {"vae": ["diffusers", "AutoencoderKL"]}, False),  # the channels tell
        (3, {"safety_checker": ["x", "y"]}, False),  # pixels
        (3, {"vae": [None, None]}, False),  # a component that was left out
    ],
)
def test_a_decoder_is_part_of_a_model_where_samples_would_pass_for_pixels(
    folder_store: NodeStore, model: Path, channels: int, components: dict[str, Any], kept: bool
) -> None:
    write_json(model / "unet" / "config.json", CONFIG | {"in_channels": channels})
    alone = import_model(folder_store, model)
    index = {"_class_name": "P", "unet": ["diffusers", "UNet2DModel"], **components}
    write_json(model / "model_index.json", index)
    inside = import_model(folder_store, model)
    assert (inside.digest != alone.digest) is kept
    assert ("model_index.json" in read_manifest(folder_store, inside.digest)["files"]) is kept
    # the denoiser's own folder, given by itself, lies in the same pipeline
    assert import_model(folder_store, model / "unet").digest == inside.digest


def test_an_index_that_does_not_name_the_denoiser_is_not_its_pipelines(model: Path, folder_store: NodeStore) -> None:
    write_json(model / "unet" / "config.json", CONFIG | {"in_channels": 3})
    alone = import_model(folder_store, model)
    write_json(model / "model_index.json", {"transformer": ["a", "b"], "vae": ["diffusers", "AutoencoderKL"]})
    assert import_model(folder_store, model).digest == alone.digest


def test_an_index_that_is_not_json_is_refused(model: Path, folder_store: NodeStore) -> None:
    write_json(model / "unet" / "config.json", CONFIG | {"in_channels": 3})
    (model / "model_index.json").write_text("{")
    refuse(folder_store, model, "got text that is not JSON")
