"""The transformers of UNets on Triton: an image that lies channels last is one of tokens already.

diffusers' `Transformer2DModel` normalizes the image, lays it out as tokens, and lays these out as an image again, and
adds the input: four passes over memory that change nothing but the order, and leave the image behind them in another
one, which the next block has to undo. Here views stand in for them; the norm is part of the projection in front where
that quantizes its input by a table, the sum part of the one behind.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from kernels.fp8 import Fp8Matrix
from quant_core.runtime.layer import RuntimeLayer
from quant_spec.enums import KernelBackend


class FusedTransformer2D(Transformer2DModel):
    """A `Transformer2DModel` over an image, whose `norm` is an Identity where its `proj_in` normalizes."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if not self.use_linear_projection:
            tokens = _tokens(self.proj_in(self.norm(hidden_states)))
        elif isinstance(self.norm, nn.Identity):
            tokens = self.proj_in(_tokens(hidden_states))
        else:
            tokens = self.proj_in(_tokens(self.norm(hidden_states)))
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if self.use_linear_projection:
            return _image(_with_sum(self.proj_out, hidden_states, _tokens(residual)), height, width)
        return _with_sum(self.proj_out, _image(hidden_states, height, width), residual)


def fuse_transformers(model: nn.Module) -> None:
    """Let the transformers of a runtime UNet on Triton work on images that lie channels last, in place."""
    for module in model.modules():
        if type(module) is Transformer2DModel and module.is_input_continuous:
            # The same parameters, and hooks, and all that whoever holds it has.
            module.__class__ = FusedTransformer2D
            if type(module.norm) is nn.GroupNorm and _normalizes(module.proj_in):
                module.proj_in.take_norm(module.norm, silu=False)
                module.norm = nn.Identity()


def _normalizes(layer: object) -> TypeGuard[RuntimeLayer]:
    """Whether a layer is one product of codes on Triton, whose grids are in a table."""
    if not isinstance(layer, RuntimeLayer) or layer.run.backend is not KernelBackend.TRITON:
        return False
    if len(layer.parts) != 1 or layer.branch is not None or layer.differences:
        return False
    part = layer.parts[0]
    return not isinstance(part.weight, Fp8Matrix) and part.table is not None and part.channels is None


def _tokens(image: Tensor) -> Tensor:
    """View (B, C, H, W) as (B, H * W, C), or copy it so where it is not channels last."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """View (B, H * W, C) as (B, C, H, W)."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _with_sum(layer: Any, x: Tensor, residual: Tensor) -> Tensor:
    """Return a layer's output plus `residual`."""
    out: Tensor = layer(x, residual=residual) if isinstance(layer, RuntimeLayer) else layer(x) + residual
    return out
