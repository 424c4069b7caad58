"""Scales of groups that are whole numbers times one of their output channel (docs/adr/0017-integer-group-scales.md).

    w_hat[n, k] = scale[n] * (multiplier[n, g] * (code[n, k] - zero_point[n, g])),   g the group of column k,

with the product in parentheses an int8 for every code: QServe's progressive group quantization (Lin et al.,
arXiv:2405.04532, Sec. 4.1) with the codes' own zero points. Where we differ: the channel's scale is searched, and so
are multipliers, by the error that they leave, instead of quantizing int8 codes again.

Zero points come from each group's range; they are the same for all scales of a range that shrinks towards zero. So the
error of a group is a function of its scale alone, measured once on a fine grid of scales (the range search's own
candidates, and some wider ones); a channel's scale is then tried at many values without looking at weights again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant_core.nn.layers import exact_scale
from quant_core.nn.ranges import SEARCH_POWER, QParams, find_range, qparams_from_range
from quant_spec.enums import RangeMethod
from quant_spec.formats import GREATEST_MULTIPLIER
from quant_spec.ranges import RangeSpec

# Scales that errors are measured at, relative to those of the whole range.
_LEAST, _MOST, _STEP = 0.21, 1.30, 0.01
# Scales of a channel, relative to the least with which every group reaches its best: so many, evenly in the logarithm.
_CHANNEL_LEAST, _CHANNEL_MOST, _CHANNEL_COUNT = 0.85, 2.0, 96
# Weights that are looked at together.
_CHUNK = 1 << 21


def most_multiplied(zero_point: Tensor, bits: int) -> Tensor:
    """Return the greatest multiplier of each zero point with which no code leaves int8, float32."""
    above, below = 2**bits - 1 - zero_point, zero_point
    most = torch.minimum(128 // below.clamp(min=1), 127 // above.clamp(min=1))
    return most.clamp(max=GREATEST_MULTIPLIER).float()


def integer_grid(
    matrix: Tensor, bits: int, group_index: Tensor, parts: Tensor, ranges: RangeSpec, *, symmetric: bool
) -> QParams:
    """Choose the grid of a weight matrix (C_out, K) whose groups have multipliers.

    Parameters
    ----------
    bits : int
        6 at most.
    group_index : Tensor, shape (K,), dtype int64
        Group of each column.
    parts : Tensor, shape (G,), dtype int64
        Which scale of its channel each group multiplies, from 0 on.

    Returns
    -------
    QParams
        All of shape (C_out, G); `scale` is the multiplier times its channel's scale, exactly.

    Notes
    -----
    A range that is searched has the multipliers of least error; others the least with which nothing of it is clipped,
    and the channel's scale that makes these least on average.
    """
    sizes = torch.bincount(group_index).tolist()
    order = torch.argsort(group_index, stable=True).split(sizes)
    alike = {size: [group for group, own in enumerate(sizes) if own == size] for size in sorted(set(sizes))}
    columns = {size: torch.stack([order[group] for group in groups]) for size, groups in alike.items()}
    found = []
    for rows in matrix.split(max(1, _CHUNK // matrix.shape[1])):
        base, zero_point = (matrix.new_empty(len(rows), len(parts)) for _ in range(2))
        curves = matrix.new_empty(*base.shape, len(_relative_scales(matrix)))
        for size, groups in alike.items():
            values = rows[:, columns[size]]
            grid = qparams_from_range(*find_range(values, ranges), bits, symmetric=symmetric)
            base[:, groups], zero_point[:, groups] = grid.scale, grid.zero_point
            curves[:, groups] = _error_curves(values, grid, bits, ranges)
        multiplier, scale = torch.empty_like(base), torch.empty_like(base)
        for part in range(int(parts.max()) + 1):
            own = parts == part
            most = most_multiplied(zero_point[:, own], bits)
            channel, multiplier[:, own] = _search(base[:, own], most, curves[:, own])
            scale[:, own] = multiplier[:, own] * channel[:, None]
        found.append((scale, zero_point, multiplier))
    scale, zero_point, multiplier = (torch.cat(each) for each in zip(*found, strict=True))
    return QParams(scale, zero_point, multiplier)


def _relative_scales(like: Tensor) -> Tensor:
    """Return the scales that errors are measured at."""
    return _LEAST + _STEP * torch.arange(round((_MOST - _LEAST) / _STEP) + 1, device=like.device)


def _error_curves(values: Tensor, base: QParams, bits: int, ranges: RangeSpec) -> Tensor:
    """Return the error of groups (C, G, n) at each relative scale, shape (C, G, R)."""
    relative = _relative_scales(values)
    if ranges.method is not RangeMethod.MSE:
        clips = relative < 1 - _STEP / 2
        power = relative.square().masked_fill(clips, torch.inf)
        return base.scale.square()[..., None] * power * values.shape[-1]
    zero_point, curves = base.zero_point[..., None], []
    # As many scales at once as make work worth its calls; each group's error is the same sum of the same numbers.
    for some in relative.split(max(1, _CHUNK // values.numel())):
        scale = (base.scale * some[:, None, None])[..., None]
        codes = torch.round(values / scale).add_(zero_point).clamp_(0, 2**bits - 1)
        error = codes.sub_(zero_point).mul_(scale).sub_(values)
        curves.append(error.abs_().pow_(SEARCH_POWER).sum(-1))
    return torch.cat(curves).movedim(0, -1)


def _search(base: Tensor, most: Tensor, curves: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale of each channel, shape (C,), and multipliers, (C, G), of least error in all its groups."""
    best = base * _relative_scales(base)[curves.argmin(-1)]
    start = (best / most).amax(1)
    factors = torch.linspace(math.log(_CHANNEL_LEAST), math.log(_CHANNEL_MOST), _CHANNEL_COUNT).exp()
    channel, multiplier = start.clone(), torch.ones_like(base)
    least = torch.full_like(start, torch.inf)
    for some in factors.to(start).split(max(1, _CHUNK // base.numel())):
        scale = exact_scale(start * some[:, None])  # (F, C)
        wanted = best / scale[..., None]
        below, above = (torch.minimum(each.clamp(min=1), most) for each in (wanted.floor(), wanted.ceil()))
        errors = [_at(curves, scale[..., None] * each / base) for each in (below, above)]
        chosen = torch.where(errors[0] <= errors[1], below, above)
        total, first = torch.minimum(*errors).sum(-1).min(0)
        better = total < least
        rows = torch.arange(len(start), device=start.device)
        least = torch.where(better, total, least)
        channel = torch.where(better, scale[first, rows], channel)
        multiplier = torch.where(better[:, None], chosen[first, rows], multiplier)
    return exact_scale(channel), multiplier


def _at(curves: Tensor, relative: Tensor) -> Tensor:
    """Read curves (C, G, R) at relative scales (F, C, G); beyond their end errors grow as all that do not saturate."""
    place = torch.round((relative - _LEAST) / _STEP).long().clamp(0, curves.shape[-1] - 1)
    errors = curves.expand(*place.shape, -1).gather(-1, place[..., None])[..., 0]
    return torch.where(relative > _MOST, errors * (relative / _MOST) ** SEARCH_POWER, errors)
