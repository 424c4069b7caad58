"""What a denoiser's forward gives: a tensor, a tuple of them, or one of diffusers' output records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def prediction_of(output: Any, x: Tensor) -> Tensor:
    """Return the prediction in what a denoiser gave for the input `x`, without learned-variance channels."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    learns_variance = found.shape[1] == 2 * x.shape[1] and found.shape[2:] == x.shape[2:]
    return found[:, : x.shape[1]] if learns_variance else found


def map_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an output of the same type, with each tensor changed; all else in it stays."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return tuple(map_output(item, change) for item in output)
    if hasattr(output, "items"):
        return type(output)(**{name: map_output(value, change) for name, value in output.items()})
    return output
