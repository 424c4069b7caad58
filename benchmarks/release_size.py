"""Bytes of 4-bit releases over those of their models in float16.

    python -m benchmarks.release_size [--model FOLDER --release NAME=FOLDER ...] --out FILE

Of a release's folder, all files count. Of SDXL's UNet, all tensors, the file's header and config.json, and nothing is
computed: the UNet (random weights would have the same size) is built on the meta device with the formats of
`fast-w4a8` (the layers that read the sample and write the prediction in 8 bits, residual shortcuts in 6, resampling
convolutions in 5, the rest in 4, the latter two with a multiplier and a zero point per group), and the file is what
`quant_core.artifact.folder` would write of it, byte for byte but for the shards of a large one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from benchmarks.cli import give, named, parser
from benchmarks.sdxl import SDXL, meta_unet
from quant_core.artifact.compact import grid_bits, packed_shape
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.nn.layers import QUANTIZABLE
from quant_core.nn.model import build_quantized
from quant_spec.enums import Granularity, GroupScale
from quant_spec.formats import ActivationSpec, AttentionSpec, LayerSpec, ModelFormat, WeightSpec
from quant_spec.quantization_config import quantization_config

STEPS = 20
_DTYPES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def release_bytes(group_size: int, scale: GroupScale) -> dict[str, Any]:
    """Count the bytes of a release with `group_size`, in total and by kind of tensor."""
    model: Any = meta_unet(SDXL).half()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model_format = _model_format(model, group_size, scale)
    build_quantized(model, model_format)
    bits = grid_bits(model)
    kinds: dict[str, int] = {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in model.state_dict().items():
        shape = packed_shape(tuple(tensor.shape), bits[name]) if name in bits else tuple(tensor.shape)
        size = torch.Size(shape).numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
        kind = "activation tables" if "quantizer" in name else name.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + size
    kinds["header"] = len(json.dumps(header, separators=(",", ":")))
    config = json.loads(model.to_json_string()) | {"quantization_config": quantization_config(model_format)}
    kinds["config.json"] = len(json.dumps(config, indent=2))
    total = sum(kinds.values())
    return {
        "group_size": group_size,
        "group_scale": str(scale),
        "parameters": parameters,
        "bytes": total,
        "of_float16": total / (2 * parameters),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
    }


def folder_bytes(release: Path, model: Path) -> dict[str, Any]:
    """Count the bytes of all files of a release, over the float16 size of the model's parameters."""
    parameters = sum(parameter.numel() for parameter in load_denoiser(model).model.parameters())
    files = {
        str(path.relative_to(release)): path.stat().st_size for path in sorted(release.rglob("*")) if path.is_file()
    }
    total = sum(files.values())
    return {"parameters": parameters, "bytes": total, "of_float16": total / (2 * parameters), "files": files}


def _model_format(model: nn.Module, group_size: int, scale: GroupScale) -> ModelFormat:
    """Return the formats of `fast-w4a8`."""
    activation = ActivationSpec(8)
    weight = WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=group_size, group_scale=scale)
    small = LayerSpec(weight, activation)
    shortcut = LayerSpec(WeightSpec(6), activation)
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, QUANTIZABLE):
            continue
        layers[name] = small
        if name in ("conv_in", "conv_out"):
            layers[name] = LayerSpec(WeightSpec(8), None)
        elif name.startswith("time_embedding.") or name.endswith(".time_emb_proj"):
            layers[name] = LayerSpec(weight, None)
        elif name.endswith("samplers.0.conv"):
            layers[name] = LayerSpec(replace(weight, bits=5), activation)
        elif name.endswith("conv_shortcut") and not name.startswith("up_blocks"):
            layers[name] = shortcut
        elif name.endswith("conv_shortcut"):
            # Any division of the channels costs the same: another scale and zero point of each output channel.
            assert isinstance(module, nn.Conv2d)
            half = module.in_channels // 2
            layers[name] = replace(shortcut, split=(half, module.in_channels - half))
    attentions = {name: AttentionSpec(activation) for name, module in model.named_modules() if hasattr(module, "to_q")}
    return ModelFormat(layers, attentions, tuple(float(step) for step in range(STEPS)))


def main() -> None:
    """Count, print JSON and write it."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path)
    options.add_argument("--release", action="append", default=[], metavar="NAME=FOLDER")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "SDXL": [release_bytes(size, scale) for scale in GroupScale for size in (32, 64, 128)],
        "releases": {name: folder_bytes(Path(folder), args.model) for name, folder in named(args.release).items()},
    }
    give(result, args.out)


if __name__ == "__main__":
    main()
