"""Build a diffusers scheduler for a model: the one place where a scheduler's config is filled."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import diffusers

from quant_spec.errors import QuantizationError
from quant_spec.scheduler_choice import choose_scheduler


def build_scheduler(name: str | None, own: Mapping[str, Any] | None, options: Mapping[str, Any]) -> Any:
    """Build a scheduler from the model's own scheduler config.

    Parameters
    ----------
    name
        Class in diffusers; None is the class of the model's config as it is.
    own
        The model's own config, or that of a packed model.
    options
        Fields that the user sets.

    Raises
    ------
    QuantizationError
        If it does not fit the model (`choose_scheduler`), or diffusers refuses a field's value.
    """
    own = dict(own or {})
    if str(own.get("variance_type", "")).startswith("learned"):
        own["variance_type"] = "fixed_small"  # call_denoiser drops the learned variance's channels
    choice = choose_scheduler(name, own, options)
    cls = getattr(diffusers, choice.name)
    try:
        return cls.from_config(copy.deepcopy(dict(choice.config)))
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise QuantizationError(
            f"sampler.options: {choice.name} of diffusers {diffusers.__version__} refuses its config: {reason}, wanted "
            "values that it takes"
        ) from error
