"""What keeps a packed model right inside whatever pipeline it is in: inputs of other widths, layers fused or added
later, casts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant_core.errors import ArtifactError
from quant_core.nn.askable import keep_askable
from quant_core.nn.attention import AttentionQuantizer
from quant_core.nn.layers import QuantLayer, check_channel_bits
from quant_core.nn.model import PACKED_MODULES
from quant_core.nn.model_dtype import model_dtype
from quant_spec.errors import QuantizationError

_NARROW = (torch.float16, torch.bfloat16)
#: Attention backends of diffusers that call `scaled_dot_product_attention`, which is what is quantized.
_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")


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
    """Let a packed model take inputs in half precision, whatever it computes in; refuse what would leave its codes.

    Refused are casts, fused projections, adapters, and attention that is not the one that is quantized. Unless the user
    says otherwise, a pipeline's text encoders have the dtype of their checkpoint, and all else float32.

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
    refuse_adapters(model, ("load_lora_adapter", "add_adapter"))
    refuse_casts(model)
    if any(isinstance(module, AttentionQuantizer) for module in model.modules()):
        model.set_attention_backend = functools.partial(_set_backend, model)  # type: ignore[assignment]
        if hasattr(model, "set_default_attn_processor"):
            model.set_default_attn_processor = _refuse_default  # type: ignore[assignment]


def refuse_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse the methods of a packed model that add a LoRA's layers beside its own."""
    for name in names:
        if hasattr(model, name):
            setattr(model, name, functools.partial(_refuse_adapter, name))


def refuse_casts(model: nn.Module) -> None:
    """Refuse every cast of a packed model: `.double()`, `.bfloat16()`, `.type(...)`, `.to(...)`; moving it works.

    Its scales would be cast too, and its codes by some. Libraries refuse a few of these, each with words of its own.
    """
    model._apply = functools.partial(_move, model)  # type: ignore[method-assign]


def _widen(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Cast what a forward is given to the model's dtype, where that is float32 and the input is narrower.

    What it gives stays in float32: schedulers then go on in it, and so do decoders, which diffusers loads so.
    """
    wanted = model_dtype(model)
    if wanted is not torch.float32 or not any(_is_narrow(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
        return None
    cast: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda leaf: leaf.to(wanted) if _is_narrow(leaf) else leaf, (args, kwargs)
    )
    return cast


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NARROW


def _move(model: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Stand in for `_apply`, through which all moves and casts of a module go."""
    for dtype in (torch.float32, torch.uint8):
        if (got := function(torch.empty(0, dtype=dtype)).dtype) is not dtype:
            raise ArtifactError(
                f"cast: got {got} for a packed {type(model).__name__}, whose scales and codes would be cast too, "
                "wanted torch_dtype=… where from_pretrained loads it"
            )
    return type(model)._apply(model, function, recurse)


def _set_backend(model: nn.Module, backend: str) -> None:
    """Stand in for a method that lets attention run in other code."""
    if backend.lower() not in _BACKENDS:
        raise ArtifactError(
            f"set_attention_backend: got {backend!r} for a packed model whose attention matmuls are quantized, wanted "
            f"one that calls scaled_dot_product_attention ({', '.join(_BACKENDS)}), or a release whose recipe has "
            "attention.enabled: false"
        )
    type(model).set_attention_backend(model, backend)  # type: ignore[attr-defined]


def _refuse_default(*_: Any, **__: Any) -> NoReturn:
    """Stand in for a method that sets a processor which multiplies by itself."""
    raise ArtifactError(
        "set_default_attn_processor: got a packed model whose attention matmuls are quantized, wanted the processors "
        "that it has, or AttnProcessor2_0 by set_attn_processor"
    )


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
