"""The table of passes: which kinds of task each adds to a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_spec.enums import UnitInputs

#: Kinds of task that every release depends on, whatever its recipe.
ALWAYS = ("calibrate", "round", "reconstruct", "pack", "reference", "evaluate", "score", "release")
#: Pass of a recipe, by its name in `passes`, to the kinds that it adds; those in `ALWAYS` add none.
PASSES: Mapping[str, tuple[str, ...]] = {
    "temporal": ("temporal",),
    "scale": ("scale",),
    "low_rank": ("low_rank",),
    "allocate": ("channel_errors", "allocate"),
    "menu": ("menu", "mix"),
    "choose": ("step_gains", "sensitivity", "choose"),
    "round": (),
    "reconstruct": (),
    "distill": ("distill",),
    "exceptions": ("trials", "exceptions"),
    "differences": ("differences",),
    "correct": ("noise", "correct"),
}
#: Kinds of other passes that a pass has no task of.
_INSTEAD = {"choose": ("round", "mix")}
#: Kinds that `components` adds, where it names others than the denoiser.
COMPONENTS = ("text_encoder", "components")
#: Kinds that passes add where steps count by their effect, and the field that says so.
BY_EFFECT = ("step_gains",)
_EFFECTS = {"distill": "effect", "differences": "by_effect", "exceptions": "choices"}
#: Kinds that rounding for quantized inputs adds.
ANSWER = ("answer",)
#: Kinds that `activations.step_bits` adds.
STEP_BITS = ("step_effects", "step_bits")


def kinds_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kinds of task that releases of a recipe depend on; the version of any other must not change its bytes.

    Parameters
    ----------
    config
        The resolved recipe as JSON; sections that are not there count as null, as in recipes of older releases.
    """
    passes, activations = config.get("passes", {}), config.get("activations", {})
    added = [kind for name, kinds in PASSES.items() if passes.get(name) is not None for kind in kinds]
    told: tuple[str, ...] = ("encode",) if config.get("prompts") else ()
    if any(entry.get("weights") is not None for entry in config.get("components", {}).values()):
        told += COMPONENTS
    if (passes.get("round") or {}).get("inputs") == UnitInputs.QUANTIZED:
        added += ANSWER
    if activations.get("step_bits") is not None:
        added += STEP_BITS
    if any((passes.get(name) or {}).get(field) for name, field in _EFFECTS.items()):
        added += [kind for kind in BY_EFFECT if kind not in added]
    without = {kind for name, kinds in _INSTEAD.items() if passes.get(name) is not None for kind in kinds}
    return tuple(kind for kind in (*ALWAYS, *told, *added) if kind not in without)
