"""A release of E4M3 numbers in the layout of NVIDIA ModelOpt's checkpoints of diffusers models.

Of each quantized Linear layer, in the model's safetensors file:

    NAME.weight         (C_out, K), float8_e4m3fn
    NAME.weight_scale   float32: shape (C_out,) of FP8_PER_CHANNEL_PER_TOKEN, () of FP8
    NAME.input_scale    float32, shape (): of FP8 alone; the other takes scales of tokens at run time

    weight = float(NAME.weight) * NAME.weight_scale[:, None]

`quantization_config` in config.json says which of the two, and which Linear layers are not quantized. It is what
`export_hf_checkpoint` of nvidia-modelopt 0.47.0 writes of a diffusers model, whose producer's name loaders ask for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.held_codes import has_plain_codes, refusal
from quant_core.errors import ArtifactError
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.attention import AttentionQuantizer
from quant_core.nn.layers import QuantLayer
from quant_spec.enums import ActivationMode, Granularity
from quant_spec.formats import LayerSpec

PER_TENSOR, PER_TOKEN = "FP8", "FP8_PER_CHANNEL_PER_TOKEN"
HOLDER = "ModelOpt's FP8 layout"
#: Of the layout that is written.
VERSION = "0.47.0"
_FLOAT8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_SCHEMES = {
    (Granularity.PER_TENSOR, ActivationMode.STATIC): PER_TENSOR,
    (Granularity.PER_CHANNEL, ActivationMode.DYNAMIC_TOKEN): PER_TOKEN,
}


def modelopt_fp8(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a quantized model as a ModelOpt checkpoint has it.

    Parameters
    ----------
    model : Module
        Quantized, on the CPU; left as it is.

    Returns
    -------
    state : dict of Tensor
        What the safetensors file holds; what is not quantized in the dtype that the model computes in.
    config : dict
        The `quantization_config` of config.json.

    Raises
    ------
    ArtifactError
        If some layer is of another format than the layout has; it names the layer and what would do.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    attentions = [name for name, module in model.named_modules() if isinstance(module, AttentionQuantizer)]
    if attentions:
        raise ArtifactError(
            f"attention {attentions[0]}: got quantized products, which {HOLDER} can't hold; "
            "wanted attention.enabled=false"
        )
    # A patch embedding is left in floats, as ModelOpt leaves it: the layout speaks of Linear layers.
    schemes = {
        name: _scheme(name, layer) for name, layer in layers.items() if has_plain_codes(name, layer, HOLDER, "fp8-w8a8")
    }
    found = sorted(set(schemes.values()))
    if len(found) != 1:
        raise ArtifactError(
            f"model: got layers of {' and '.join(found) or 'no FP8'}, which {HOLDER} can't hold; wanted one of them, "
            "as fp8-w8a8 has"
        )
    state = dequantized_state(model)
    for name in schemes:
        state.update(_tensors(name, layers[name]))
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return state, _config(found[0], sorted(plain))


def _scheme(name: str, layer: QuantLayer) -> str:
    """Return the name of a layer's format in the layout."""
    spec: LayerSpec = layer.spec
    weight, activation = spec.weight, spec.activation
    if not weight.is_float or activation is None or not activation.is_float:
        kept = "inputs as they are" if activation is None else f"{activation.type} inputs"
        raise refusal(name, f"{weight.type} weights and {kept}", HOLDER, "e4m3 of both, as fp8-w8a8 has")
    scheme = _SCHEMES.get((weight.granularity, activation.mode))
    if scheme is None:
        raise refusal(
            name,
            f"weights {weight.granularity} with inputs {activation.mode}",
            HOLDER,
            "per_channel with dynamic_token, as fp8-w8a8 has, or per_tensor with static",
        )
    return scheme


def _tensors(name: str, layer: QuantLayer) -> dict[str, Tensor]:
    """Return what replaces a layer's weight."""
    scale = layer.scale.float().flatten()
    is_one = layer.spec.weight.granularity is Granularity.PER_TENSOR
    tensors = {f"{name}.weight": layer.qweight, f"{name}.weight_scale": scale[0].clone() if is_one else scale}
    for quantizer in layer.act_quantizers:
        if isinstance(quantizer, ActivationQuantizer) and not quantizer.spec.is_dynamic:
            tensors[f"{name}.input_scale"] = quantizer.scale[0].to(torch.float32).clone()
    return tensors


def _config(scheme: str, plain: list[str]) -> dict[str, Any]:
    """Return the `quantization_config`; `plain` are the Linear layers that are not quantized."""
    groups = {"group_0": {"input_activations": _FLOAT8, "weights": _FLOAT8, "targets": ["Linear"]}}
    return {
        **({"config_groups": groups} if scheme == PER_TENSOR else {}),
        "ignore": plain,
        "quant_algo": scheme,
        "producer": {"name": "modelopt", "version": VERSION},
        "quant_method": "modelopt",
    }
