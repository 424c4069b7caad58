"""Recipes of components: the names that a recipe's `components` give are replaced by what those recipes say.

The denoiser's becomes the recipe's own method (`METHOD`), as if it had been extended; of its other sections, only what
is stated nowhere else holds. Of a text encoder's, the format of the weights and how they are rounded are left:
exceptions are for layers of denoisers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.errors import RecipeError
from orchestrator.recipes.files import merge
from quant_spec.components import is_denoiser
from quant_spec.messages import shown
from quant_spec.recipe import Recipe

#: Sections that say how a denoiser is quantized.
METHOD = ("weights", "activations", "attention", "skip_split", "layers", "passes", "budget")
_NAMED = ("name", "description", "components")

#: Reads a recipe by name or file: what its layers say, and the whole.
Read = Callable[[str], tuple[dict[str, Any], Recipe]]


def lay_components(values: Mapping[str, Any], stated: Any, read: Read) -> dict[str, Any]:
    """Lay what a recipe file, or an assignment, says of components over what holds so far.

    Parameters
    ----------
    values
        The recipe so far, its components resolved.
    stated
        Component's name to a recipe's name or file, a mapping that may extend one, or null, which removes the entry.

    Raises
    ------
    RecipeError
        If it is no such mapping, or a recipe does not fit its component.
    """
    if not isinstance(stated, Mapping):
        raise RecipeError(f"components: got {shown(stated)}, wanted a mapping of components to recipes")
    laid = dict(values)
    for name, entry in stated.items():
        own = dict(laid.get("components", {}))
        if entry is None:
            own.pop(name, None)
        else:
            more: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"extends": entry}
            reference, more = more.get("extends"), {key: item for key, item in more.items() if key != "extends"}
            below = own.get(name, {})
            if reference is not None:
                if not isinstance(reference, str):
                    raise RecipeError(f"components.{name}: got {shown(reference)}, wanted a recipe's name or a file")
                found, recipe = read(reference)
                below = {"recipe": recipe.name}
                if recipe.components:
                    raise RecipeError(
                        f"components.{name}: got {reference}, which has components of its own, wanted a recipe without"
                    )
                if is_denoiser(name):
                    kept = {key: item for key, item in laid.items() if key not in METHOD}
                    laid = merge({key: item for key, item in found.items() if key not in _NAMED}, kept)
                else:
                    below |= _weights_alone(name, reference, found, recipe)
            own[name] = merge(below, more)
        laid["components"] = own
    return laid


def check_beside(own: Mapping[str, Any]) -> None:
    """Refuse a file that names the denoiser's recipe and says itself what that says."""
    components = own.get("components")
    stated = components if isinstance(components, Mapping) else {}
    named = [
        name
        for name, entry in stated.items()
        if is_denoiser(name) and (isinstance(entry, str) or (isinstance(entry, Mapping) and "extends" in entry))
    ]
    twice = [section for section in METHOD if section in own]
    if twice and named:
        raise RecipeError(
            f"{twice[0]}: got it beside components.{named[0]}, whose recipe says it, wanted one of the two"
        )


def _weights_alone(name: str, reference: str, found: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says of a component whose weights alone are quantized."""
    wanted = "wanted a recipe of weights alone, such as weights-w8 or weights-w4"
    if recipe.activations.bits is not None:
        raise RecipeError(f"components.{name}: got {reference}, which quantizes activations, {wanted}")
    passes = recipe.passes.model_dump()
    if more := sorted(key for key, item in passes.items() if item is not None and key != "round"):
        raise RecipeError(f"components.{name}: got {reference}, which has passes.{more[0]}, {wanted}")
    return {
        "weights": dict(found.get("weights", {})),
        "passes": {"round": dict(found.get("passes", {}).get("round", {}))},
    }
