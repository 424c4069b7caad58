"""What keeps a packed model right inside whatever pipeline it is in: inputs of other widths, layers fused later."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant_core.errors import ArtifactError
from quant_core.nn.layers import QuantLayer

_NARROW = (torch.float16, torch.bfloat16)


def guard(model: nn.Module) -> None:
    """Let a packed model take inputs in half precision, whatever it computes in, and refuse fusing its projections.

    A pipeline's other components have the dtype of their checkpoint unless the user says otherwise.
    """
    cast = _Cast()
    model.register_forward_pre_hook(cast.before, with_kwargs=True)
    model.register_forward_hook(cast.after)
    for module in model.modules():
        if any(isinstance(child, QuantLayer) for child in module.children()) and hasattr(module, "fuse_projections"):
            module.fuse_projections = _refuse_fusing  # type: ignore[assignment]
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections = _refuse_fusing  # type: ignore[assignment]


class _Cast:
    """Widens inputs of half precision to the model's dtype, and gives outputs in theirs."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None

    def before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Cast what the forward is given, if it is narrower than the model."""
        wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        found = next((leaf.dtype for leaf in pytree.tree_leaves((args, kwargs)) if _is_float(leaf)), wanted)
        self.dtype = found if found in _NARROW and found is not wanted else None
        if self.dtype is None:
            return None
        cast: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
            lambda leaf: leaf.to(wanted) if _is_float(leaf) and leaf.dtype in _NARROW else leaf, (args, kwargs)
        )
        return cast

    def after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Cast what the forward gave back."""
        dtype = self.dtype
        if dtype is None:
            return output
        if isinstance(output, dict):  # diffusers' outputs, which are mappings too
            return type(output)(**{name: _to(value, dtype) for name, value in output.items()})
        return pytree.tree_map(lambda leaf: _to(leaf, dtype), output)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _is_float(value) else value


def _refuse_fusing(*_: Any, **__: Any) -> NoReturn:
    """Stand in for a method that would join weights."""
    raise ArtifactError(
        "fuse_qkv_projections: got a packed model, whose layers have codes and ranges each, wanted it as it is: "
        "projections that were fused would not be quantized"
    )
