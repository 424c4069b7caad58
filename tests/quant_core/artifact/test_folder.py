from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from quant_core.artifact.folder import (
    MANIFEST_FILE,
    SCHEDULER_FILE,
    WEIGHTS_FILE,
    parse_quantization_config,
    read_config,
    verify_folder,
    write_artifact,
)
from quant_core.errors import ArtifactError
from quant_core.nn.layers import QuantLayer
from quant_spec.formats import ModelFormat
from quant_spec.quantization_config import QUANT_METHOD, quantization_config

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}


def pack(model: nn.Module, model_format: ModelFormat, folder: Path) -> Path:
    base = json.loads(model.to_json_string())
    write_artifact(model, base, quantization_config(model_format), SCHEDULER, folder)
    return folder


@pytest.fixture
def packed(tiny_model: Make, quantize_model: Quantize, tmp_path: Path) -> Path:
    model = tiny_model("unet")
    return pack(model, quantize_model(model), tmp_path / "packed")


def write_manifest(folder: Path) -> dict[str, Any]:
    files = {
        str(path.relative_to(folder)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    manifest = {"format": 1, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return manifest


def test_write_artifact_writes_the_documented_files(tiny_model: Make, quantize_model: Quantize, tmp_path: Path) -> None:
    model = tiny_model("unet")
    model_format = quantize_model(model)
    folder = pack(model, model_format, tmp_path / "a" / "b")
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"config.json", WEIGHTS_FILE, SCHEDULER_FILE}
    config = read_config(folder)
    assert config["_class_name"] == "UNet2DModel"
    assert parse_quantization_config(config["quantization_config"]) == model_format
    assert json.loads((folder / SCHEDULER_FILE).read_text()) == SCHEDULER
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}


def test_tensors_have_the_documented_names_and_types(packed: Path) -> None:
    tensors = load_file(packed / WEIGHTS_FILE)
    codes = {name for name in tensors if name.endswith(".qweight")}
    assert "conv_in.qweight" in codes
    for name in codes:
        layer = name.removesuffix(".qweight")
        assert tensors[name].dtype == torch.uint8
        assert tensors[f"{layer}.scale"].dtype == torch.float32
        assert tensors[f"{layer}.zero_point"].dtype == torch.uint8
        assert f"{layer}.weight" not in tensors
    assert not any("group_index" in name for name in tensors)


def test_the_weights_file_is_really_small(tiny_model: Make, quantize_model: Quantize, tmp_path: Path) -> None:
    wide = type(tiny_model("unet"))(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    weights = sum(m.weight.numel() for m in wide.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    others = sum(p.numel() for p in wide.parameters()) - weights
    folder = pack(wide, quantize_model(wide), tmp_path / "packed")
    tensors = load_file(folder / WEIGHTS_FILE)
    assert sum(t.numel() for n, t in tensors.items() if n.endswith(".qweight")) <= weights / 2 * 1.01
    grids = sum(t.nbytes for n, t in tensors.items() if n.endswith((".scale", ".zero_point")))
    header = 200 * len(tensors)
    assert (folder / WEIGHTS_FILE).stat().st_size <= weights / 2 * 1.01 + 4 * others + grids + header
    assert (folder / WEIGHTS_FILE).stat().st_size < 0.45 * 2 * weights  # of half precision, at this small size


def test_the_same_model_gives_the_same_bytes(tiny_model: Make, quantize_model: Quantize, tmp_path: Path) -> None:
    folders = []
    for name in ("one", "two"):
        model = tiny_model("unet")
        folders.append(pack(model, quantize_model(model), tmp_path / name))
    contents = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert contents[0] == contents[1]


def test_write_artifact_refuses_a_folder_in_use(packed: Path, tiny_model: Make, quantize_model: Quantize) -> None:
    model = tiny_model("unet")
    before = {p: p.read_bytes() for p in packed.rglob("*") if p.is_file()}
    with pytest.raises(ArtifactError, match="not empty, wanted a new or empty folder"):
        pack(model, quantize_model(model), packed)
    assert before == {p: p.read_bytes() for p in packed.rglob("*") if p.is_file()}


def test_write_artifact_refuses_an_unfinished_rounding(
    tiny_model: Make, quantize_model: Quantize, tmp_path: Path
) -> None:
    model = tiny_model("unet")
    model_format = quantize_model(model)
    layer = next(m for m in model.modules() if isinstance(m, QuantLayer))
    layer.soft_weight = layer.weight
    with pytest.raises(ArtifactError, match=r"layer conv_in: got a rounding that is still being learned"):
        pack(model, model_format, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gguf"}, "quant_method: got 'gguf', wanted 'quantmill'"),
        ({"version": 4}, "version: got 4, wanted 1 or 2 or 3"),
        ({"layers": None}, "malformed"),
        ({"version": 1, "layers": {"conv_in": {"weight": {"bits": 9}}}}, "got 9 bits, wanted one of"),
        ({"layers": {"conv_in": 0}, "formats": [{"weight": {"bits": 4, "color": 1}}]}, "unexpected keyword"),
        ({"layers": {"conv_in": 1}, "formats": [{"weight": {"bits": 4}}]}, "got format 1 of 1"),
        ({"layers": {"conv_in": -1}, "formats": [{"weight": {"bits": 4}}]}, "got format -1 of 1"),
        ({"unknown_timestep": "guess"}, "guess"),
    ],
)
def test_foreign_and_malformed_configs_are_refused(change: dict[str, Any], message: str) -> None:
    good = quantization_config(ModelFormat({}, {}))
    assert good["quant_method"] == QUANT_METHOD
    with pytest.raises(ArtifactError, match=message):
        parse_quantization_config(good | change)


def test_read_config_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text('{"_class_name": "UNet')
    with pytest.raises(ArtifactError, match="not JSON"):
        read_config(tmp_path)
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="got a JSON list, wanted an object"):
        read_config(tmp_path)
    path.write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ArtifactError, match="got no quantization_config"):
        read_config(tmp_path)


def test_verify_folder_accepts_whole_folders(packed: Path) -> None:
    verify_folder(packed)
    write_manifest(packed)
    verify_folder(packed)


def test_verify_folder_needs_safetensors(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ArtifactError, match="got no safetensors file"):
        verify_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(packed: Path, keep: int) -> None:
    weights = packed / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="truncated or damaged safetensors"):
        verify_folder(packed)


def test_a_changed_byte_is_noticed(packed: Path) -> None:
    write_manifest(packed)
    weights = packed / WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=f"{WEIGHTS_FILE}: got sha256 .* wanted .* by manifest.json"):
        verify_folder(packed)
    weights.write_bytes(bytes(data) + b"x")
    with pytest.raises(ArtifactError, match="bytes, wanted"):
        verify_folder(packed)


def test_missing_and_unlisted_files_are_noticed(packed: Path) -> None:
    write_manifest(packed)
    extra = packed / "another.safetensors"
    extra.write_bytes((packed / WEIGHTS_FILE).read_bytes())
    with pytest.raises(ArtifactError, match=r"another.safetensors: got a file that manifest.json does not list"):
        verify_folder(packed)
    extra.unlink()
    (packed / SCHEDULER_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"scheduler_config.json: listed in manifest.json, but missing"):
        verify_folder(packed)


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "scheduler/../../secret", "a\\b", ""])
def test_escaping_names_are_refused(packed: Path, name: str) -> None:
    manifest = write_manifest(packed)
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (packed / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="wanted one inside the folder"):
        verify_folder(packed)


def test_links_are_refused(packed: Path, tmp_path: Path) -> None:
    write_manifest(packed)
    outside = tmp_path / "outside"
    (packed / "scheduler").rename(outside)
    (packed / "scheduler").symlink_to(outside)
    with pytest.raises(ArtifactError, match="scheduler: got a link"):
        verify_folder(packed)


def test_malformed_manifests_are_refused(packed: Path) -> None:
    (packed / MANIFEST_FILE).write_text('{"format": 2, "files": {}}')
    with pytest.raises(ArtifactError, match=r"manifest.json: got format 2, wanted 1"):
        verify_folder(packed)
    (packed / MANIFEST_FILE).write_text('{"format": 1, "files": []}')
    with pytest.raises(ArtifactError, match="wanted 1 with a table of files"):
        verify_folder(packed)
