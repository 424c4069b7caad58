"""Fake quantization of activations: static, per trajectory step, or dynamic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.affine import fake_quantize_affine
from quant_core.errors import QuantizationError
from quant_core.qspec import ActivationMode, ActivationSpec
from quant_core.ranges import QParams, qparams_from_range
from quant_core.steps import StepClock
from quant_core.straight_through import FakeQuantize


class ActivationQuantizer(nn.Module):
    """Quantizes one tensor and dequantizes it right away, computed in float32 and returned in the tensor's dtype.

    Attributes
    ----------
    scale, zero_point : Tensor, shape (S,), dtype float32
        One entry per trajectory step, or one in all; absent when the spec is dynamic. `zero_point` holds integers.
    soft_scale, soft_zero_point : Tensor, shape (S,), or None
        While they are learned, what stands in for `scale` and `zero_point`; both hold what would be stored.
    tops : Tensor, shape (S,), dtype float32
        Greatest code at each step, where bits differ between steps; follows from the spec, so not in the state dict.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: ActivationSpec, clock: StepClock, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.clock = clock
        self.enabled = True
        self.soft_scale: Tensor | None = None
        self.soft_zero_point: Tensor | None = None
        if len(spec.step_bits) not in (0, clock.steps):
            raise QuantizationError(
                f"step_bits: got bits of {len(spec.step_bits)} steps, wanted the trajectory's {clock.steps}"
            )
        self.tops = torch.tensor([2.0**bits - 1 for bits in spec.step_bits])
        if not spec.is_dynamic:
            steps = clock.steps if spec.mode is ActivationMode.PER_STEP else 1
            self.register_buffer("scale", torch.ones(steps, device=device))
            self.register_buffer("zero_point", torch.zeros(steps, device=device))

    def set_qparams(self, qparams: QParams) -> None:
        """Take the tables of `qparams`, each of shape (S,)."""
        self.scale.copy_(qparams.scale)
        self.zero_point.copy_(qparams.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized codes of `x`; dim 0 of `x` is the batch (or a multiple of it)."""
        if not self.enabled:
            return x
        if self.spec.is_dynamic:
            qparams = dynamic_qparams(x, self.spec)
            scale, zero_point = qparams.scale, qparams.zero_point
        else:
            table = self.scale if self.soft_scale is None else self.soft_scale
            zeros = self.zero_point if self.soft_zero_point is None else self.soft_zero_point
            scale, zero_point = self.clock.gather(table, x), self.clock.gather(zeros, x)
        top = self._top(x)
        if torch.is_grad_enabled():
            return FakeQuantize.apply(x, scale, zero_point, top).to(x.dtype)
        return fake_quantize_affine(x, scale, zero_point, 0, top).to(x.dtype)

    def _top(self, x: Tensor) -> int | Tensor:
        """Return the greatest code, for each sample of `x` where they are of steps with different bits."""
        if not self.spec.step_bits:
            return 2**self.spec.bits - 1
        return self.clock.gather(self.tops.to(x.device), x)


def dynamic_qparams(x: Tensor, spec: ActivationSpec) -> QParams:
    """Return min-max grids of each sample of `x`, or of each token (last dimension) unless `x` is an image (4-D)."""
    per_token = spec.mode is ActivationMode.DYNAMIC_TOKEN and x.dim() in (2, 3)
    dims = (x.dim() - 1,) if per_token else tuple(range(1, x.dim()))
    detached = x.detach().float()
    low, high = detached.amin(dim=dims, keepdim=True), detached.amax(dim=dims, keepdim=True)
    return qparams_from_range(low, high, spec.bits, symmetric=spec.symmetric)
