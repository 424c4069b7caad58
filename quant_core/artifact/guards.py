"""What keeps a packed model right inside whatever pipeline it is in: inputs of other widths, layers fused or added
later."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant_core.errors import ArtifactError
from quant_core.nn.askable import keep_askable
from quant_core.nn.layers import QuantLayer, check_channel_bits
from quant_core.nn.model import PACKED_MODULES
from quant_spec.errors import QuantizationError

_NARROW = (torch.float16, torch.bfloat16)


def check_layer(name: str, layer: QuantLayer) -> None:
    """Raise ArtifactError if the tensors of a layer, just loaded, contradict its format."""
    try:
        if layer.spec.weight.mixture:
            check_channel_bits(layer.channel_bits, layer.spec)
        layer.check_multipliers()
    except QuantizationError as error:
        raise ArtifactError(f"packed tensors of {name}: {error}") from error


class Computes(nn.Module):
    """Says which dtype a model computes in that has no weights left in one; not part of what it saves.

    diffusers, and pipelines, take a model's dtype from its first parameter, else from its first buffer.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


def guard(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a packed model take inputs in half precision, whatever it computes in; refuse fused projections and adapters.

    Unless the user says otherwise, a pipeline's text encoders have the dtype of their checkpoint, and all else float32.

    Parameters
    ----------
    dtype : torch.dtype
        What the user asked for. It is the model's, also where all of its weights are packed, as in SD3's transformer.
    """
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        model.add_module("computes", Computes(dtype))
    model.register_forward_pre_hook(_widen, with_kwargs=True)
    keep_askable(model, PACKED_MODULES)
    for module in model.modules():
        if any(isinstance(child, QuantLayer) for child in module.children()) and hasattr(module, "fuse_projections"):
            module.fuse_projections = _refuse_fusing  # type: ignore[assignment]
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections = _refuse_fusing  # type: ignore[assignment]
    for name in ("load_lora_adapter", "add_adapter"):
        if hasattr(model, name):
            setattr(model, name, functools.partial(_refuse_adapter, name))


def _widen(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Cast what a forward is given to the model's dtype, where that is float32 and the input is narrower.

    What it gives stays in float32: schedulers then go on in it, and so do decoders, which diffusers loads so.
    """
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if wanted is not torch.float32 or not any(_is_narrow(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
        return None
    cast: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda leaf: leaf.to(wanted) if _is_narrow(leaf) else leaf, (args, kwargs)
    )
    return cast


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NARROW


def _refuse_adapter(name: str, *_: Any, **__: Any) -> NoReturn:
    """Stand in for a method that would add a LoRA's layers beside the model's."""
    raise ArtifactError(
        f"{name}: got a packed model, whose layers have codes and no weights to add to, wanted the LoRA fused into the "
        "model before it is quantized"
    )


def _refuse_fusing(*_: Any, **__: Any) -> NoReturn:
    """Stand in for a method that would join weights."""
    raise ArtifactError(
        "fuse_qkv_projections: got a packed model, whose layers have codes and ranges each, wanted it as it is: "
        "projections that were fused would not be quantized"
    )
