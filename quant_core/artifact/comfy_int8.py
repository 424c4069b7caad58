"""A release of 8-bit codes in ComfyUI's own layout of quantized layers, `int8_tensorwise`.

Names are those of the authors' checkpoints (`quant_core.artifact.original_names`). Of each quantized layer:

    NAME.weight         (C_out, K), int8
    NAME.weight_scale   (C_out, 1), float32
    NAME.comfy_quant    the bytes of {"format": "int8_tensorwise"}, uint8

    weight = float(NAME.weight) * NAME.weight_scale

ComfyUI takes codes of its own of each token of an input; ours of inputs are not in the file. Weights are not rotated
(`convrot` absent).

References
----------
Comfy-Org/ComfyUI, comfy/ops.py (_load_quantized_module) and comfy/quant_ops.py; comfy-kitchen 0.2.40, tensor/int8.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.held_codes import has_plain_codes, refusal
from quant_core.artifact.original_names import naming_of, original_tensors, swap_halves
from quant_core.nn.layers import QuantLayer

HOLDER = "ComfyUI's int8 layout"
_MARK = {"format": "int8_tensorwise"}


def comfy_int8(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a quantized model's tensors as ComfyUI loads them.

    Parameters
    ----------
    model : Module
        Quantized, on the CPU; left as it is.
    config : mapping
        Its config.json.

    Returns
    -------
    dict of Tensor
        What is not quantized in the dtype that the model computes in.

    Raises
    ------
    ArtifactError
        If the layout does not hold some layer's codes, or names of such models in checkpoints are not known.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    codes = {
        f"{name}.weight": _codes(name, layer)
        for name, layer in layers.items()
        if has_plain_codes(name, layer, HOLDER, "weights-w8")
    }
    plain = dequantized_state(model)
    state = {}
    for tensor in original_tensors(naming_of(str(config["_class_name"])), plain):
        parts = [codes[source] for source in tensor.sources if source in codes]
        if len(parts) < len(tensor.sources):
            whole = torch.cat([plain[source] for source in tensor.sources])
            state[tensor.name] = swap_halves(whole) if tensor.swapped else whole
            continue
        for end, values in zip(("", "_scale"), zip(*parts, strict=True), strict=True):
            whole = torch.cat(values)
            state[f"{tensor.name}{end}"] = swap_halves(whole) if tensor.swapped else whole
        mark = json.dumps(_MARK).encode()
        state[f"{tensor.name.removesuffix('weight')}comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    return state


def _codes(name: str, layer: QuantLayer) -> tuple[Tensor, Tensor]:
    """Return a layer's codes, (C_out, K) int8, and their scales, (C_out, 1) float32."""
    weight = layer.spec.weight
    if weight.is_float:
        raise refusal(name, "e4m3 numbers", HOLDER, "int codes, as weights-w8 has, or --format modelopt-fp8")
    if layer.scale.shape[1] > 1 or weight.is_multiplied:
        raise refusal(name, f"scales {weight.granularity}", HOLDER, "weights.granularity=per_channel")
    values = layer.codes().int() - layer.zero_point.int()
    if int(values.min()) < -128 or int(values.max()) > 127:
        raise refusal(name, f"zero points other than {2 ** (weight.bits - 1)}", HOLDER, "weights.symmetric=true")
    return values.to(torch.int8), layer.scale.float().expand(len(values), 1).contiguous()
