"""Fake quantization of activations: static, per trajectory step, or dynamic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.affine import fake_quantize_affine
from kernels.fp8 import fake_quantize_fp8, fp8_scale
from quant_core.nn.ranges import QParams, qparams_from_range
from quant_core.nn.steps import StepClock
from quant_core.nn.straight_through import FakeQuantize, FakeQuantizeFp8
from quant_spec.enums import ActivationMode
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec


@dataclass(frozen=True, slots=True)
class Channels:
    """The channels of a quantized tensor: `count` of them along `dim`, and whether each has a scale, a shift."""

    count: int
    dim: int
    scaled: bool
    shifted: bool

    def shape(self, x: Tensor, values: Tensor) -> Tensor:
        """Return `values`, shape (C,) or (rows, C), shaped to broadcast against `x`."""
        lead = len(values) if values.dim() == 2 else 1
        shape = [lead] + [1] * (x.dim() - 1)
        shape[self.dim] = self.count
        return values.reshape(shape)


class ChannelScale(nn.Module):
    """Divides the channels of a tensor that is not quantized, because the weight behind was rounded for that.

    Attributes
    ----------
    channel_scale : Tensor, shape (C,), dtype float32, > 0
    """

    channel_scale: Tensor

    def __init__(self, channels: Channels, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("channel_scale", torch.ones(channels.count, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return x / channel_scale, computed in float32, in the dtype of `x`."""
        return (x / self.channels.shape(x, self.channel_scale)).to(x.dtype)


class ActivationQuantizer(nn.Module):
    """Quantizes one tensor and dequantizes it right away, computed in float32 and returned in the tensor's dtype.

        code  = clamp(round(x / (scale * 2**shift[c] * channel_scale[c])) + zero_point, 0, top)
        x_hat = (code - zero_point) * scale * 2**shift[c]

    So what comes out stands for x / channel_scale: the weight behind is multiplied by it. Numbers of type E4M3 are

        number = e4m3(clamp(x / (scale * channel_scale[c]), -448, 448)),     x_hat = number * scale

    Attributes
    ----------
    scale, zero_point : Tensor, shape (S,), dtype float32
        One entry per trajectory step, or one in all; absent when the spec is dynamic. `zero_point` holds integers.
    channel_scale : Tensor, shape (C,), dtype float32, > 0
        Only where channels are scaled.
    channel_shift : Tensor, shape (S, C), dtype uint8
        Only where channels are shifted.
    soft_scale, soft_zero_point : Tensor, shape (S,), or None
        While they are learned, what stands in for `scale` and `zero_point`; both hold what would be stored.
    tops : Tensor, shape (S,), dtype float32
        Greatest code at each step, where bits differ between steps; follows from the spec, so not in the state dict.
    """

    scale: Tensor
    zero_point: Tensor
    channel_scale: Tensor
    channel_shift: Tensor

    def __init__(
        self,
        spec: ActivationSpec,
        clock: StepClock,
        device: torch.device | str | None = None,
        channels: Channels | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.clock = clock
        self.channels = channels
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
        if channels is not None and channels.scaled:
            self.register_buffer("channel_scale", torch.ones(channels.count, device=device))
        if channels is not None and channels.shifted:
            shape = (len(self.scale), channels.count)
            self.register_buffer("channel_shift", torch.zeros(shape, dtype=torch.uint8, device=device))

    def set_qparams(self, qparams: QParams) -> None:
        """Take the tables of `qparams`, each of shape (S,)."""
        self.scale.copy_(qparams.scale)
        self.zero_point.copy_(qparams.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized codes of `x`; dim 0 of `x` is the batch (or a multiple of it)."""
        channel_scale = self._channel_scale(x)
        if not self.enabled:
            return x if channel_scale is None else (x / channel_scale).to(x.dtype)
        if self.spec.is_dynamic:
            qparams = dynamic_qparams(x if channel_scale is None else x / channel_scale, self.spec)
            scale, zero_point = qparams.scale, qparams.zero_point
        else:
            table = self.scale if self.soft_scale is None else self.soft_scale
            zeros = self.zero_point if self.soft_zero_point is None else self.soft_zero_point
            scale, zero_point = self.clock.gather(table, x), self.clock.gather(zeros, x)
            scale = scale * self._channel_steps(x)
        input_scale = scale if channel_scale is None else scale * channel_scale
        if self.spec.is_float:
            if torch.is_grad_enabled():
                return FakeQuantizeFp8.apply(x, scale, channel_scale).to(x.dtype)
            return fake_quantize_fp8(x, input_scale, scale).to(x.dtype)
        top = self._top(x)
        if torch.is_grad_enabled():
            return FakeQuantize.apply(x, scale, zero_point, top, channel_scale).to(x.dtype)
        return fake_quantize_affine(x, input_scale, zero_point, 0, top, output_scale=scale).to(x.dtype)

    def _channel_scale(self, x: Tensor) -> Tensor | None:
        if self.channels is None or not self.channels.scaled:
            return None
        return self.channels.shape(x, self.channel_scale)

    def _channel_steps(self, x: Tensor) -> Tensor | float:
        """Return 2**shift of each channel, for each sample of `x` where they are of different steps."""
        if self.channels is None or not self.channels.shifted:
            return 1.0
        rows = self.channel_shift[0]
        if len(self.channel_shift) > 1:
            index = self.clock.index.to(self.channel_shift.device)
            rows = self.channel_shift.index_select(0, index.reshape(-1))  # a plain index would be read on the host
            rows = rows if index.dim() else rows[0]
        if rows.dim() == 2 and x.shape[0] != len(rows):
            rows = rows.repeat_interleave(x.shape[0] // len(rows), dim=0)
        return torch.exp2(self.channels.shape(x, rows).float())

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
    if spec.is_float:
        scale = fp8_scale(detached.abs().amax(dim=dims, keepdim=True))
        return QParams(scale, torch.zeros_like(scale))
    low, high = detached.amin(dim=dims, keepdim=True), detached.amax(dim=dims, keepdim=True)
    return qparams_from_range(low, high, spec.bits, symmetric=spec.symmetric)
