"""Round one layer: the grid of its weight, nearest codes or those in closed form, and what they leave at its output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8 import to_fp8
from quant_core.fit.closed_form import Factor, factorize, round_closed_form, round_closed_form_fp8
from quant_core.fit.group_scales import integer_grid
from quant_core.fit.hessian import InputMoments, SecondMoment
from quant_core.nn.layers import QuantLayer, greatest_code, group_parts, scale_dtype, weight_matrix
from quant_core.nn.ranges import QParams, choose_fp8_scale, choose_qparams
from quant_spec.enums import Granularity
from quant_spec.formats import LayerSpec
from quant_spec.passes.round import RoundFit
from quant_spec.ranges import RangeSpec


def weight_grid(
    matrix: Tensor, spec: LayerSpec, group_index: Tensor, ranges: RangeSpec, bits: int | Tensor | None = None
) -> QParams:
    """Choose scales and zero points of a weight matrix (C_out, K), of shape (C_out, G) or (1, 1), and multipliers.

    Scales are what their stored dtype can hold, so that codes are chosen for the grid that is used. `bits`, shape
    (C_out,), where output channels have bits of their own.
    """
    bits = spec.weight.bits if bits is None else bits
    if spec.weight.is_float:
        return _fp8_grid(matrix, spec, group_index, ranges)
    if spec.weight.granularity is Granularity.PER_TENSOR:
        whole = choose_qparams(matrix.reshape(1, -1), spec.weight.bits, symmetric=spec.weight.symmetric, spec=ranges)
        return QParams(whole.scale[:, None], whole.zero_point[:, None])
    if spec.weight.is_multiplied:
        assert isinstance(bits, int), "channels with bits of their own have no groups"
        parts = group_parts(int(group_index.max()) + 1, spec)
        return integer_grid(matrix, bits, group_index, parts, ranges, symmetric=spec.weight.symmetric)
    grids = [
        _row_grids(matrix[:, group_index == group], bits, spec.weight.symmetric, ranges)
        for group in range(int(group_index.max()) + 1)
    ]
    scale = torch.stack([grid.scale for grid in grids], dim=1).to(scale_dtype(spec)).float()
    return QParams(scale, torch.stack([grid.zero_point for grid in grids], dim=1))


def _fp8_grid(matrix: Tensor, spec: LayerSpec, group_index: Tensor, ranges: RangeSpec) -> QParams:
    """Choose scales of E4M3 numbers; zero points are 0."""
    if spec.weight.granularity is Granularity.PER_TENSOR:
        whole = choose_fp8_scale(matrix.reshape(1, -1), ranges)
        return QParams(whole.scale[:, None], whole.zero_point[:, None])
    grids = [choose_fp8_scale(matrix[:, group_index == group], ranges) for group in range(int(group_index.max()) + 1)]
    return QParams(
        torch.stack([grid.scale for grid in grids], dim=1), torch.stack([grid.zero_point for grid in grids], dim=1)
    )


def _row_grids(rows: Tensor, bits: int | Tensor, symmetric: bool, ranges: RangeSpec) -> QParams:
    """Choose one grid for each row, of the same or of its own bits."""
    if isinstance(bits, int):
        return choose_qparams(rows, bits, symmetric=symmetric, spec=ranges)
    scale, zero_point = torch.empty(len(rows)), torch.empty(len(rows))
    for width in torch.unique(bits).tolist():
        own = bits == width
        grid = choose_qparams(rows[own], width, symmetric=symmetric, spec=ranges)
        scale[own], zero_point[own] = grid.scale.cpu(), grid.zero_point.cpu()
    return QParams(scale.to(rows.device), zero_point.to(rows.device))


def nearest_codes(matrix: Tensor, grid: QParams, bits: int | Tensor, group_index: Tensor) -> Tensor:
    """Return the nearest codes of a weight matrix, shape (C_out, K), dtype uint8; `bits` may be of each row."""
    scale, zero_point = grid.scale[:, group_index], grid.zero_point[:, group_index]
    codes = (torch.round(matrix / scale) + zero_point).clamp_(min=0)
    return torch.minimum(codes, torch.as_tensor(greatest_code(bits)).to(codes)).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class RoundedLayer:
    """What rounding a layer's weight leaves at its output (of the weight, where there are no second moments).

    `sqnr_db`: signal-to-noise ratio in dB. `channel_errors`, shape (C_out,): error power of each output channel.
    """

    sqnr_db: float
    channel_errors: Tensor


def input_moments(layer: QuantLayer, seen: SecondMoment | None, config: RoundFit) -> InputMoments | None:
    """Return what closed-form rounding of a layer needs of its input; None where nothing was seen of it.

    With `correct_bias`, a layer that has a bias is rounded for the covariance of its input.
    """
    if seen is None:
        return None
    if config.correct_bias and layer.bias is not None:
        return InputMoments(seen.covariance(), seen.mean_row())
    return InputMoments(seen.mean())


def round_layer(
    layer: QuantLayer,
    weight: Tensor,
    moments: InputMoments | None,
    ranges: RangeSpec,
    damping: float,
    factor: Factor | None = None,
) -> RoundedLayer:
    """Set a layer's codes: the nearest, or those in closed form if moments of the input are given; and its bias.

    Parameters
    ----------
    weight : Tensor, shape of the weight, float32
        What codes are to stand for: in full precision, `QuantLayer.scaled` where the layer scales its input channels or
        has a low-rank branch.
    moments : InputMoments, optional
        Of the layer's input. With a mean, the layer's bias, which must be that of full precision, takes the mean error.
    damping : float
        Share of the mean diagonal of the second moments that is added to it.
    factor : Factor, optional
        Of these second moments with this damping, where several widths share it.
    """
    matrix, bits, groups = weight_matrix(weight.float()), layer.bits, layer.group_index.to(weight.device)
    grid = weight_grid(matrix, layer.spec, groups, ranges, bits)
    # A grouped convolution has one Hessian for each group of channels; such layers are small and rounded to nearest.
    moments = moments if moments is not None and len(moments.second) == matrix.shape[1] else None
    if factor is None and moments is not None:
        factor = factorize(moments.second, damping)
    if layer.spec.weight.is_float:
        scale = grid.scale[:, groups]
        numbers = to_fp8(matrix, scale) if factor is None else round_closed_form_fp8(matrix, factor, scale)
        layer.set_numbers(numbers, grid.scale)
    else:
        if factor is None:
            codes = nearest_codes(matrix, grid, bits, groups)
        else:
            codes = round_closed_form(matrix, factor, grid, bits, groups)
        layer.set_codes(codes, grid.scale, grid.zero_point, grid.multiplier)
    error = matrix - weight_matrix(layer.weight.float())
    if moments is not None and moments.mean is not None and layer.bias is not None:
        layer.bias += (error @ moments.mean).to(layer.bias)
    return _rounded(weight_matrix(layer.with_branch(weight.float())), error, moments)


def _rounded(matrix: Tensor, error: Tensor, moments: InputMoments | None) -> RoundedLayer:
    """Weigh an error of a weight matrix by the second moments of its input; what the bias takes is no error."""
    if moments is None:
        signal, noise = matrix.square(), error.square()
    else:
        signal, noise = (matrix @ moments.second) * matrix, (error @ moments.second) * error
    power = float(signal.sum())
    if moments is not None and moments.mean is not None:
        power += float((matrix @ moments.mean).square().sum())
    ratio = max(power, 1e-30) / float(noise.sum().clamp(min=1e-30))
    return RoundedLayer(10 * math.log10(ratio), noise.sum(dim=1))
