"""The step sizes and zero points of one activation while they are learned (TALSQ, arXiv:2310.03270, Sec. 3.3)."""

from __future__ import annotations

import torch

from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.straight_through import round_through


class LearnedTable:
    """The scales and zero points of one activation, while they are learned.

    Attributes
    ----------
    log_scale, zero_point : Tensor, shape (S,), require grad (the latter unless the grid is symmetric)
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        self.start_scale = quantizer.scale.clone()
        self.log_scale = torch.zeros_like(self.start_scale, requires_grad=True)
        self.zero_point = quantizer.zero_point.clone().requires_grad_(
            not (quantizer.spec.symmetric or quantizer.spec.is_float)
        )
        bits = quantizer.spec.step_bits or (quantizer.spec.bits,)
        self.top = torch.tensor([2.0**b - 1 for b in bits], device=self.start_scale.device)

    def apply(self) -> None:
        """Let the quantizer use what has been learned so far, as it would be stored."""
        self.quantizer.soft_scale = self.start_scale * self.log_scale.exp()
        zero_point = round_through(self.zero_point).clamp(min=0)
        self.quantizer.soft_zero_point = torch.minimum(zero_point, self.top)

    @torch.no_grad()
    def commit(self) -> None:
        """Store what was learned."""
        self.apply()
        assert self.quantizer.soft_scale is not None
        assert self.quantizer.soft_zero_point is not None
        self.quantizer.scale.copy_(self.quantizer.soft_scale)
        self.quantizer.zero_point.copy_(self.quantizer.soft_zero_point)
        self.release()

    def release(self) -> None:
        """Let the quantizer use what is stored."""
        self.quantizer.soft_scale = self.quantizer.soft_zero_point = None
