"""Random packed weights of a layer's shape."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packing import pack_codes
from kernels.weights import PackedWeight, pack_weight

#: Standard deviations of a normal weight that the codes of one channel span, to both sides.
SPAN = 4.0


def random_weight(
    outputs: int,
    channels: int,
    taps: int,
    bits: int,
    group_size: int | None = None,
    channel: Tensor | None = None,
    *,
    uniform: bool = True,
    zero_points: bool = False,
    multiplied: bool = False,
    device: str = "cpu",
) -> PackedWeight:
    """Make a symmetric weight with scales 0.01, per channel or per `group_size` input channels of one tap.

    Groups have multipliers if they are `multiplied`, else bfloat16 scales.

    Parameters
    ----------
    outputs, channels, taps
        Channels that the layer writes and reads, positions of its kernel (1 of a Linear).
    channel
        Output channels that it is of, if not all.
    uniform
        Every code is as frequent; else they are those of a quantized normal weight, as real ones are. It matters for
        the time: tensor cores draw more power, and clock lower, on codes whose bits change more often.
    zero_points
        Not in the middle of the codes, as of weights that are not symmetric.
    """
    rows = outputs if channel is None else len(channel)
    groups = 1 if group_size is None else taps * -(-channels // group_size)
    half = 1 << (bits - 1)
    if uniform:
        codes = torch.randint(0, 1 << bits, (rows, taps * channels), dtype=torch.uint8, device=device)
    else:
        steps = torch.randn(rows, taps * channels, device=device) * (half / SPAN)
        codes = (steps.round() + half).clamp(0, 2 * half - 1).to(torch.uint8)
    zero = torch.full((rows, groups), half - zero_points, dtype=torch.uint8, device=device)
    multiplier = None
    if multiplied:
        most = min(16, 127 // half)  # also for a zero point of half - 1
        multiplier = torch.randint(1, most + 1, (rows, groups), device=device)
    columns = groups if multiplier is None else 1
    dtype = torch.bfloat16 if group_size is not None and multiplier is None else torch.float32
    scale = torch.full((rows, columns), 0.01, dtype=dtype, device=device)
    return pack_weight(
        pack_codes(codes, bits),
        scale,
        zero,
        bits=bits,
        channels=channels,
        taps=taps,
        group_size=group_size,
        channel=channel,
        multiplier=multiplier,
    )
