"""Parameters of fits, with a value for every required field."""

from __future__ import annotations

from typing import Any

from quant_spec.enums import RoundingMethod, StartCodes
from quant_spec.tasks import channel_errors, distill, reconstruct, round, scale

#: As samples or positions: all that there are.
ALL = 1_000_000
_UNITS: dict[str, Any] = {"seed": 0, "forward_batch_size": 32}


def rounding(method: RoundingMethod | str = RoundingMethod.NEAREST, **changes: Any) -> round.Params:
    """How units are rounded: second moments over all calibration rows, 16 positions of each."""
    settings = {**_UNITS, "samples": ALL, "positions": 16, "damping": 0.03, **changes}
    return round.Params(units=(), method=RoundingMethod(method), **settings)


def reconstruction(**changes: Any) -> reconstruct.Params:
    """How a unit is reconstructed: from its own codes, with full-precision inputs, all of them in memory."""
    return reconstruct.Params(**{**_UNITS, "cache_bytes": 2 * 2**30, "start": StartCodes.ROUND, **changes})


def scaling(**changes: Any) -> scale.Params:
    """How channels are scaled: over all calibration rows, for weights that will be rounded in closed form."""
    return scale.Params(units=(), **{**_UNITS, "samples": ALL, **changes})


def measurement(samples: int, positions: int, batch_size: int, **changes: Any) -> channel_errors.Params:
    """On how much the errors of channels are measured, for weights that will be rounded in closed form."""
    settings = {**_UNITS, "forward_batch_size": batch_size, **changes}
    return channel_errors.Params(units=(), layers=(), samples=samples, positions=positions, **settings)


def distillation(**changes: Any) -> distill.Params:
    """How a model is distilled: the recipe's rates and weights, seed 0."""
    return distill.Params(**{"seed": 0, **changes})
