"""Loading a packed model never holds its float weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quant_core
from quant_core.artifact.folder import WEIGHTS_FILE, write_artifact
from quant_core.nn.layers import QUANTIZABLE, QuantLayer
from quant_core.nn.model import build_quantized
from quant_core.runtime.loader import load_folder
from quant_spec.enums import ActivationMode
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec
from quant_spec.quantization_config import quantization_config

# What the allocator, the config and the tensors' Python objects take, whatever the size of the model.
FIXED_BYTES = 24 << 20
LOAD = """
import sys
from pathlib import Path
import torch
import quant_core


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

small, large, backend = sys.argv[1:]
quant_core.load_quantized(small, backend=backend)  # what is imported on the way
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = quant_core.load_quantized(large, backend=backend)
total = sum(int(buffer.flatten()[::1024].sum()) for buffer in model.buffers())  # touches every page of a mapped file
print(status("VmHWM") - before, status("VmRSS") - before)
"""


def write_random(folder: Path, channels: tuple[int, ...]) -> int:
    """Write a 4-bit UNet of random codes that never had float weights; return the number of its weights."""
    from diffusers import UNet2DModel

    blocks = len(channels)
    with torch.device("meta"):
        model = UNet2DModel(
            sample_size=16,
            block_out_channels=channels,
            layers_per_block=2,
            down_block_types=("DownBlock2D",) * blocks,
            up_block_types=("UpBlock2D",) * blocks,
        )
    names = [name for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)]
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    spec = LayerSpec(WeightSpec(4), ActivationSpec(8, mode=ActivationMode.STATIC))
    model_format = ModelFormat(dict.fromkeys(names, spec), {})
    config = json.loads(model.to_json_string())
    build_quantized(model, model_format)
    model.to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        torch.nn.init.ones_(tensor) if tensor.is_floating_point() else tensor.random_(0, 16)
        assert name
    write_artifact(model, config, quantization_config(model_format), None, folder)
    return weights


class LargestFloat(TorchDispatchMode):
    """Remembers the largest floating tensor with values that an operator gave.

    Not what `empty` gives: diffusers makes each parameter so, one at a time, before it drops it for one on the meta
    device. Pages that nobody writes are never there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in [] if func is torch.ops.aten.empty.memory_format else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.device.type != "meta":
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_no_weight_becomes_float(tmp_path: Path, backend: str) -> None:
    write_random(tmp_path / "model", (32, 64))
    with LargestFloat() as seen:
        model: Any = quant_core.load_quantized(tmp_path / "model", backend=backend)
    with LargestFloat() as reference:
        layer = load_folder(tmp_path / "model").get_submodule("mid_block.resnets.0.conv1")
        assert isinstance(layer, QuantLayer)
        weight = layer.weight
    assert reference.numel == weight.numel() == 64 * 64 * 9, "this mode sees a dequantized weight"
    assert 0 < seen.numel < weight.numel() // 8
    assert {str(run.backend) for run in quant_core.layer_runs(model)} == {backend}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident peak from /proc")
@pytest.mark.parametrize(
    ("backend", "at_most", "left"),
    # The CPU's integer backend holds a byte for each weight, twice the packed size; while it loads, also the mapped
    # file and one layer's copies, of which the largest has a twelfth of all weights here.
    [("reference", 1.10, 1.10), ("cpu", 3.6, 2.15)],
)
def test_the_peak_of_loading_is_the_packed_size(tmp_path: Path, backend: str, at_most: float, left: float) -> None:
    write_random(tmp_path / "small", (32, 64))
    weights = write_random(tmp_path / "large", (448, 896, 1344))
    packed = (tmp_path / "large" / WEIGHTS_FILE).stat().st_size
    assert weights > 200_000_000
    assert packed < 0.52 * weights
    script = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large"), backend]
    run = subprocess.run(script, capture_output=True, text=True, check=True)
    peak, resident = map(int, run.stdout.split()[-2:])
    assert packed * 0.9 < peak < at_most * packed + FIXED_BYTES
    assert resident < left * packed + FIXED_BYTES
