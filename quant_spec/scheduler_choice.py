"""Which scheduler samples from a model: the model's own, or another that fits it, with fields from the model's config.

The model's own scheduler config says how the model was trained. A class that a recipe names instead gets these fields;
where it has fields that the model's config lacks, none is taken from the class's defaults without being noted.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_spec.errors import QuantizationError
from quant_spec.schedulers import (
    CLIPPING,
    SCHEDULERS,
    TRAINED,
    TRAINING_ONLY,
    WITHOUT,
    Family,
    family_of,
    matters,
)

#: Families of which a model's own scheduler is the only one that fits.
_SINGLE = (Family.ALONE, Family.CONTINUOUS)
#: Fields that say no more of a model than that it is for flow matching; its shift has two names.
_SAID_BY_FLOW = frozenset(
    {*("use_flow_sigmas", "prediction_type", "shift", "flow_shift"), *("beta_start", "beta_end", "beta_schedule")}
)
#: Training that classes without these fields are for.
_NEUTRAL = WITHOUT | {"shift": 1.0, "num_train_timesteps": 1000}
#: Integers beyond this are no float64.
_LARGEST = 2**1023
#: Steps of training that a scheduler makes tables of.
_MOST_TIMESTEPS = 1_000_000
#: Fields that are rarely set, and with which a class may divide by zero; classes that may with betas of a cosine.
_UNUSUAL = ("rescale_betas_zero_snr", "trained_betas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_NOT_COSINE = ("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
#: The largest beta that no class minds, and the fewest steps that some take.
_LARGEST_BETA, _FEWEST = 0.1, {"PNDMScheduler": 4, "UnCLIPScheduler": 2}
#: How many classes a message names.
_SHOWN = 7


@dataclass(frozen=True, slots=True)
class SchedulerChoice:
    """A scheduler class, and the config to build it from.

    Attributes
    ----------
    own
        Class of the model's own scheduler, if it has one.
    filled
        Fields that the model's scheduler does not have, with the class's defaults.
    off
        Clipping that the class does by default and the model's scheduler does not do; it is off.
    """

    name: str
    own: str | None
    config: Mapping[str, Any]
    filled: Mapping[str, Any]
    off: tuple[str, ...]

    @property
    def note(self) -> str | None:
        """One line on what was not the model's to say, for whoever chose the class; None if all was."""
        if not self.filled and not self.off:
            return None
        instead = f"instead of the model's {self.own}" if self.own else "for a model without a scheduler config"
        parts = [f"{_fields(self.filled)} (from {self.name}'s defaults)"] if self.filled else []
        parts += [f"{name}=false (nothing in the model's config clips)" for name in self.off]
        return f"sampler: {self.name} {instead}: {'; '.join(parts)}"


def default_scheduler(own: Mapping[str, Any] | None) -> str:
    """Return the class that samples from a model by default: its own, or DDIM where that is only trained with (DDPM).

    Raises
    ------
    QuantizationError
        If the model has no scheduler config, or names a class that is not in the table.
    """
    name = _own_class(own)
    if name is None:
        raise QuantizationError(
            "sampler.scheduler: got null for a model without scheduler/scheduler_config.json, wanted that file, or "
            "sampler.scheduler with sampler.options"
        )
    if name not in SCHEDULERS:
        raise QuantizationError(
            f"sampler.scheduler: got null for a model whose own is {name}, which samples from noise in no way known "
            "here, wanted the name of one that does"
        )
    default = TRAINING_ONLY.get(name, name)
    fields = SCHEDULERS[name].fields | _stated(own)
    return default if fields.get("beta_schedule") in (*SCHEDULERS[default].beta_schedules, None) else name


def choose_scheduler(
    name: str | None, own: Mapping[str, Any] | None, options: Mapping[str, Any] | None = None
) -> SchedulerChoice:
    """Check that a scheduler fits a model, and gather its config.

    Parameters
    ----------
    name
        Class in diffusers; None is the class of the model's config as it is.
    own
        The model's own scheduler config, as diffusers saves it; None or empty if it has none.
    options
        Fields that the user sets.

    Raises
    ------
    QuantizationError
        If there is no such class, it is for another family of models or another prediction type, it has no such
        option, or the model's config lacks what says how the model was trained.
    """
    own_class, stated = _own_class(own), _stated(own)
    chosen = name or own_class or default_scheduler(own)
    options = dict(options or {})
    _check_known(chosen, options)
    known, given = _own_fields(own_class, stated), stated | options
    fields = SCHEDULERS[chosen].fields
    _check_family(chosen, own_class, known, given)
    if chosen == own_class:
        _check_values(chosen, fields | given)
        return SchedulerChoice(chosen, own_class, {**_notes(own), **given}, {}, ())
    values = _inherited(chosen, known, given)
    _check_values(chosen, fields | values)
    _check_trained(chosen, own_class, known, values)
    rest = {field: value for field, value in fields.items() if field not in values}
    said = [field for field, value in rest.items() if known.get(field, not value) != value]
    filled = {field: rest[field] for field in said if matters(field, fields | values)}
    unsaid = CLIPPING & fields.keys() - given.keys() - known.keys()
    off = tuple(sorted(field for field in unsaid if fields[field] and not values[field]))
    return SchedulerChoice(chosen, own_class, {**_notes(own), **stated, **values, **rest, **options}, filled, off)


def is_plain(choice: SchedulerChoice, steps: int) -> bool:
    """Whether it is known that a scheduler's steps give finite numbers for finite predictions; else it must be tried.

    Zero signal at the last timestep, noise levels that are spread anew, and numbers of steps at the ends of what a
    class takes are where some classes divide by zero or lose count.
    """
    if choice.name not in SCHEDULERS:
        return True
    config = {**SCHEDULERS[choice.name].fields, **choice.config}
    if family_of(choice.name, config) not in (Family.DIFFUSION, Family.CONSISTENCY):
        return True
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
    if config.get("beta_schedule") not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        return False
    if (cosine and choice.name in _NOT_COSINE) or any(config.get(field) for field in _UNUSUAL):
        return False
    if config.get("steps_offset") not in (None, 0, 1) or (not cosine and config.get("beta_end", 1.0) > _LARGEST_BETA):
        return False
    most = min(config["num_train_timesteps"] // 4, config.get("original_inference_steps") or math.inf)
    return _FEWEST.get(choice.name, 1) <= steps <= most


def _own_class(own: Mapping[str, Any] | None) -> str | None:
    """Return the class that a scheduler config is of."""
    return None if not own else own.get("_class_name")


def _stated(own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields that a scheduler config holds, without diffusers' notes."""
    return {key: value for key, value in (own or {}).items() if not key.startswith("_")}


def _notes(own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return diffusers' notes in a scheduler config: its class and version."""
    return {key: value for key, value in (own or {}).items() if key.startswith("_")}


def _own_fields(own_class: str | None, stated: dict[str, Any]) -> dict[str, Any]:
    """Return all fields that the model's own scheduler has, with what other classes call the same."""
    if own_class is None or own_class not in SCHEDULERS:
        return dict(stated)
    fields = SCHEDULERS[own_class].fields | stated
    if own_class in TRAINING_ONLY:
        fields["set_alpha_to_one"] = True  # where its last step ends
    if family_of(own_class, fields) is Family.FLOW:
        shift = fields.get("shift", fields.get("flow_shift"))
        fields |= {"shift": shift, "flow_shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return fields


def _inherited(chosen: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a class's fields that are the model's or the user's to say."""
    values: dict[str, Any] = {}
    for field in SCHEDULERS[chosen].fields:
        if field in given:
            values[field] = given[field]
        elif field in TRAINED | CLIPPING:
            if field in known:
                values[field] = known[field]
            elif field in WITHOUT:
                values[field] = WITHOUT[field]
    return values


def _check_known(chosen: str, options: Mapping[str, Any]) -> None:
    """Refuse classes that are not in the table, and options that the class has not."""
    if chosen not in SCHEDULERS:
        raise QuantizationError(
            f"sampler.scheduler: got {chosen!r}, wanted a scheduler class of diffusers that samples from noise"
            f"{_nearest(chosen, SCHEDULERS)}"
        )
    fields = SCHEDULERS[chosen].fields
    for option in options:
        if option not in fields:
            raise QuantizationError(
                f"sampler.options: got {option!r}, wanted a field of {chosen}{_nearest(option, fields)}"
            )


def _check_family(chosen: str, own_class: str | None, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a class for another family of models than the model's own scheduler is for."""
    if own_class is None:
        return
    if own_class in SCHEDULERS:
        own_family = family_of(own_class, known)
    elif {"beta_schedule", "prediction_type"} <= known.keys():
        own_family = Family.DIFFUSION
    else:
        raise QuantizationError(
            f"sampler.scheduler: got {chosen} for a model whose own is {own_class}, of which it is not known what "
            "fits, wanted a known class, or beta_schedule and prediction_type, in the model's scheduler config"
        )
    family = family_of(chosen, _inherited(chosen, known, given))
    if family is not own_family or (family in _SINGLE and chosen != own_class):
        raise QuantizationError(
            f"sampler.scheduler: got {chosen} ({family}) for a model of {own_class} ({own_family}), wanted "
            f"{_fitting(own_family)}"
        )


def _fitting(family: Family) -> str:
    """Return what may be named for models of a family, a few of many."""
    names = [
        name
        for name, entry in SCHEDULERS.items()
        if entry.family is family or (family is Family.FLOW and "use_flow_sigmas" in entry.fields)
    ]
    if family in _SINGLE or not names:
        return "null, which is that"
    return f"null, which is that, or one of {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"


def _check_trained(chosen: str, own_class: str | None, known: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Refuse a class that the model's training can't be told: it lacks a field, or the model's config does."""
    entry = SCHEDULERS[chosen]
    effective = entry.fields | values
    missing = [f for f in entry.fields if f in TRAINED and f not in values and matters(f, effective)]
    if missing:
        whose = f"its {own_class}" if own_class else "its scheduler"
        raise QuantizationError(
            f"sampler.scheduler: got {chosen} for a model that does not say {', '.join(missing)} of {whose}, wanted "
            f"{'it' if len(missing) == 1 else 'them'} in scheduler/scheduler_config.json or sampler.options"
        )
    if known.get("use_flow_sigmas"):
        known = {field: value for field, value in known.items() if field not in _SAID_BY_FLOW}
    for field in sorted(TRAINED & known.keys() - entry.fields.keys()):
        if matters(field, known) and known[field] != _NEUTRAL.get(field):
            raise QuantizationError(
                f"sampler.scheduler: got {chosen}, which has no {field}, wanted one that has: the model's "
                f"{own_class} has {field}={_text(known[field])}"
            )


def _check_values(chosen: str, values: Mapping[str, Any]) -> None:
    """Refuse prediction types, schedules of betas and numbers that a class can't use."""
    entry = SCHEDULERS[chosen]
    for field, wanted in (("prediction_type", entry.predictions), ("beta_schedule", entry.beta_schedules)):
        if wanted and values[field] not in wanted:
            raise QuantizationError(
                f"sampler.scheduler: got {chosen} for {field}={_text(values[field])}, wanted a class that takes it "
                f"({chosen}: {', '.join(sorted(wanted))})"
            )
    _check_numbers(chosen, values)


def _check_numbers(chosen: str, values: Mapping[str, Any]) -> None:
    """Refuse numbers of which no sample would come, and more steps of training than tables are made for."""
    entry = SCHEDULERS[chosen]
    for field, default in entry.fields.items():
        if isinstance(default, int | float) and not isinstance(default, bool) and matters(field, values):
            _check_number(f"sampler.scheduler: {chosen} of {field}", values[field], default)
    betas = values.get("trained_betas")
    if betas is not None and not (
        isinstance(betas, list) and betas and all(_is_finite(beta) and 0 <= beta <= 1 for beta in betas)
    ):
        raise QuantizationError(f"sampler.scheduler: {chosen} of trained_betas: got others, wanted numbers from 0 to 1")
    if "beta_start" in entry.fields and matters("beta_start", values):
        for field in ("beta_start", "beta_end"):
            if not 0 <= values[field] <= 1:
                raise QuantizationError(
                    f"sampler.scheduler: {chosen} of {field}: got {values[field]}, wanted from 0 to 1"
                )
    steps = values.get("num_train_timesteps", 1)
    if not (isinstance(steps, int) and 1 <= steps <= _MOST_TIMESTEPS):
        raise QuantizationError(
            f"sampler.scheduler: {chosen} of num_train_timesteps: got {_text(steps)}, wanted an integer from 1 to "
            f"{_MOST_TIMESTEPS}"
        )


def _check_number(what: str, value: Any, default: float) -> None:
    """Refuse what is no finite number, unless that is the class's default; an inspection has infinite ones as text."""
    if not _is_finite(value) and (_is_finite(default) or value not in (default, str(default))):
        raise QuantizationError(f"{what}: got {_text(value)}, wanted a finite number")


def _is_finite(value: Any) -> bool:
    """Say whether a value is a number that float64 has."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < _LARGEST


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    """Return a hint at the name that was meant, if one is near."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    return f"; the nearest is {near[0]}" if near else ""


def _fields(values: Mapping[str, Any]) -> str:
    """Return fields as name=value."""
    return ", ".join(f"{name}={_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    """Return a value as a recipe would write it."""
    return value if isinstance(value, str) else json.dumps(value)
