"""What a recipe says of single components of a whole pipeline: by name, or by a pattern of names such as text_encoder*.

The denoiser's entry names the recipe that the recipe's own sections came from. A text encoder's says how the weights of
its Linear layers are stored and rounded.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field

from quant_spec.passes.round import Round
from quant_spec.pipeline import DENOISERS
from quant_spec.recipe_formats import Weights
from quant_spec.record import Record


class ComponentPasses(Record):
    """The steps of the method."""

    round: Round = Field(default=Round(), description="How weights are rounded; samples counts prompts.")


class ComponentRecipe(Record):
    """How one component is quantized: its weights alone."""

    recipe: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")] | None = Field(
        default=None, description="Name of the recipe that was asked for; in a file, `components.NAME: RECIPE` for all."
    )
    weights: Weights | None = Field(
        default=None,
        description="Format of the weights of its Linear layers; null for the denoiser, of which the recipe's own "
        "sections speak.",
    )
    passes: ComponentPasses = Field(default=ComponentPasses(), description="The steps of the method.")


def is_denoiser(name: str) -> bool:
    """Whether a component's name is that of a denoiser."""
    return name in DENOISERS


def entry_for(components: Mapping[str, ComponentRecipe], name: str) -> ComponentRecipe | None:
    """Return what is said of a component: its own entry, else the last pattern that matches its name."""
    if name in components:
        return components[name]
    found = [entry for pattern, entry in components.items() if fnmatch.fnmatchcase(name, pattern)]
    return found[-1] if found else None


def text_encoders(
    components: Mapping[str, ComponentRecipe], names: Iterable[str]
) -> dict[str, tuple[ComponentRecipe, Weights]]:
    """Return which of a pipeline's components a recipe quantizes beside the denoiser: name to entry and format."""
    found = {name: entry_for(components, name) for name in names if not is_denoiser(name)}
    return {name: (entry, entry.weights) for name, entry in found.items() if entry is not None and entry.weights}
