from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import quant_core
from kernels.backend import BackendUnavailableError
from kernels.errors import KernelError
from quant_core.artifact.folder import WEIGHTS_FILE, write_artifact
from quant_core.errors import ArtifactError
from quant_core.nn.layers import QuantLayer
from quant_core.runtime.loader import load_folder
from quant_spec.enums import KernelBackend
from quant_spec.errors import QuantizationError
from quant_spec.formats import ModelFormat
from quant_spec.quantization_config import quantization_config

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]


def predict(model: nn.Module, timestep: int = 500, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return model(x, timestep, torch.tensor([0, 3])).sample


@pytest.fixture
def simulated(tiny_model: Make, quantize_model: Quantize, tmp_path: Path) -> nn.Module:
    model = tiny_model("unet")
    model_format = quantize_model(model)
    folder = tmp_path / "packed"
    write_artifact(model, json.loads(model.to_json_string()), quantization_config(model_format), None, folder)
    return model


@pytest.fixture
def packed(simulated: nn.Module, tmp_path: Path) -> Path:
    return tmp_path / "packed"


def test_a_folder_loads_bit_for_bit_on_the_reference(simulated: nn.Module, packed: Path) -> None:
    for source in (packed, str(packed)):
        model = quant_core.load_quantized(source, device="cpu", backend="reference")
        assert not model.training
        assert torch.equal(predict(model), predict(simulated))
        assert {run.backend for run in quant_core.layer_runs(model)} == {KernelBackend.REFERENCE}


def test_auto_is_integer_arithmetic_on_a_cpu_that_has_it(simulated: nn.Module, packed: Path) -> None:
    model = quant_core.load_quantized(packed)
    runs = quant_core.layer_runs(model)
    assert {run.backend for run in runs} == {KernelBackend.CPU}
    layers = {name: module for name, module in simulated.named_modules() if isinstance(module, QuantLayer)}
    assert [run.layer for run in runs] == list(layers)
    assert not any(isinstance(module, QuantLayer) for module in model.modules()), "packed weights are not held twice"
    want = predict(simulated)
    assert float((predict(model) - want).norm()) < 0.02 * float(want.norm())


def test_triton_layers_come_from_a_folder(packed: Path) -> None:
    runs = quant_core.layer_runs(quant_core.load_quantized(packed, backend="triton"))
    assert {run.backend for run in runs} == {KernelBackend.TRITON}


def test_plain_diffusers_loads_the_reference(simulated: nn.Module, packed: Path) -> None:
    family: Any = type(simulated)
    model = family.from_pretrained(packed)
    assert torch.equal(predict(model), predict(simulated))
    assert {run.reason for run in quant_core.layer_runs(model)} == {"no runtime was built"}


def test_a_folder_of_links_loads_without_its_manifest(simulated: nn.Module, packed: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for file in packed.iterdir():
        (links / file.name).symlink_to(file)
    assert torch.equal(predict(load_folder(links)), predict(simulated))


@pytest.mark.parametrize("reference", ["emoji@prod", "emoji@3", "emoji", "s3://bucket/prefix/sha256/ab/abcd"])
def test_a_name_goes_to_the_resolver(packed: Path, reference: str) -> None:
    asked = []

    def resolve(name: str) -> Path:
        asked.append(name)
        return packed

    assert isinstance(quant_core.load_quantized(reference, resolve=resolve), nn.Module)
    assert asked == [reference]


def test_without_a_resolver_the_installed_registry_is_asked(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.storage import resolve

    asked: list[str] = []

    def pull(name: str) -> Path:
        asked.append(name)
        return packed

    monkeypatch.setattr(resolve, "pull", pull)
    assert isinstance(quant_core.load_quantized("emoji@prod"), nn.Module)
    assert asked == ["emoji@prod"]


@pytest.mark.parametrize("source", ["./missing", "/missing/folder", "Emoji@prod", "a@b@c", "s3://", Path("missing")])
def test_what_is_neither_folder_nor_name_is_refused(source: str | Path) -> None:
    with pytest.raises(ArtifactError, match="wanted a folder, name@version or s3://") as caught:
        quant_core.load_quantized(source, resolve=lambda name: pytest.fail(f"asked for {name}"))
    assert caught.value.exit_code == 2


def test_unknown_backends_are_refused_before_anything_is_read() -> None:
    with pytest.raises(KernelError, match="got 'cuda', wanted one of auto, reference, triton, cpu") as caught:
        quant_core.load_quantized("/missing", backend="cuda")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("device", ["tpu7", "cuda:99"])
def test_absent_devices_are_refused(packed: Path, device: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"device: got '{device}'"):
        quant_core.load_quantized(packed, device=device)


def test_truncated_weights_are_refused(packed: Path) -> None:
    weights = packed / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-7])
    for load in (quant_core.load_quantized, load_folder):
        with pytest.raises(ArtifactError, match="truncated or damaged"):
            load(packed)


def test_a_folder_that_differs_from_its_manifest_is_refused(packed: Path) -> None:
    entry = {"sha256": "0" * 64, "bytes": (packed / "config.json").stat().st_size}
    files = {"config.json": entry, WEIGHTS_FILE: entry}
    (packed / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(ArtifactError, match=r"config\.json: got sha256 .*, wanted 0000"):
        quant_core.load_quantized(packed)


@pytest.mark.parametrize("name", ["NoSuchModel", "DDIMScheduler", "utils", None])
def test_unknown_classes_are_refused(packed: Path, name: str | None) -> None:
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"_class_name": name}))
    with pytest.raises(ArtifactError, match=f"got class {name!r}, wanted a model class of diffusers"):
        quant_core.load_quantized(packed)


def test_weights_of_another_model_are_refused(packed: Path) -> None:
    save_file({"weight": torch.zeros(3)}, packed / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"missing \d+ tensors of the model"):
        quant_core.load_quantized(packed)


def test_a_full_precision_folder_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    tiny_model("unet").save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="got no quantization_config"):
        quant_core.load_quantized(tmp_path)


def test_it_needs_nothing_above_quant_core(packed: Path) -> None:
    script = (
        "import sys; import quant_core; quant_core.load_quantized(sys.argv[1]);"
        "above = {'workers', 'orchestrator', 'ray', 'sqlalchemy'} & set(sys.modules);"
        "sys.exit(str(above) if above else 0)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(packed)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
def test_it_runs_on_the_gpu(simulated: nn.Module, packed: Path) -> None:
    model = quant_core.load_quantized(packed, device="cuda")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cuda"}
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model(x.cuda(), torch.tensor([500, 100], device="cuda"), torch.tensor([0, 3], device="cuda")).sample.cpu()
        want = simulated(x, torch.tensor([500, 100]), torch.tensor([0, 3])).sample
    # Sums run in another order there, and a code on the edge of its step may fall to the other side.
    assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
# bfloat16 has 8 bits where float16 has 11, and CPUs differ in how they sum its products (AMX).
@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0.05), (torch.bfloat16, 0.1)])
def test_a_model_may_compute_in_half_precision(
    simulated: nn.Module, packed: Path, backend: str, dtype: torch.dtype, share: float
) -> None:
    model: Any = quant_core.load_quantized(packed, backend=backend, dtype=dtype)
    assert model.dtype is dtype
    got, want = predict(model, dtype=dtype), predict(simulated)
    assert got.dtype is dtype
    assert float((got.float() - want).norm()) < share * float(want.norm())
    with pytest.raises(QuantizationError, match=r"dtype: got torch.int8, wanted one of torch.float32"):
        quant_core.load_quantized(packed, dtype=torch.int8)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_copy_follows_its_own_timestep(packed: Path, backend: str) -> None:
    model = quant_core.load_quantized(packed, backend=backend)
    twin = copy.deepcopy(model)
    for timestep in (900, 100):
        assert torch.equal(predict(twin, timestep), predict(model, timestep))
    if backend == "reference":
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(predict(again, 900), predict(model, 900))


@pytest.mark.parametrize("device", ["meta", "tpu"])
def test_devices_without_values_are_refused(packed: Path, device: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"device: got '{device}'"):
        quant_core.load_quantized(packed, device=device)
