"""Whether a recipe's components are those of a model's pipeline, and such that can be quantized."""

from __future__ import annotations

import fnmatch
from typing import Any

from orchestrator.db.rows import ModelRow
from orchestrator.errors import RecipeError
from orchestrator.planning.pipeline import pipeline_of
from orchestrator.prompts.choose import told_by
from quant_spec.messages import nearest
from quant_spec.recipe import Recipe


def is_text_encoder(part: dict[str, Any]) -> bool:
    """Whether a component, as an inspection describes it, is a text encoder whose weights can be packed."""
    return bool(part["library"] == "transformers" and part["parameters"] and part["name"].startswith("text_encoder"))


def check_components(model: ModelRow, recipe: Recipe) -> None:
    """Refuse entries for components that the pipeline does not have, or that stay in full precision.

    Raises
    ------
    RecipeError
        Naming the entry.
    """
    if not recipe.components:
        return
    pipeline = pipeline_of(model)
    if pipeline is None:
        raise RecipeError(
            f"components: got {', '.join(recipe.components)} for model {model.name}, a bare denoiser, wanted none, or "
            "a whole pipeline"
        )
    parts = {part["name"]: part for part in pipeline["components"]}
    fitting = [name for name, part in parts.items() if is_text_encoder(part) and told_by(model) == "prompt"]
    for name, entry in recipe.components.items():
        found = [each for each in parts if fnmatch.fnmatchcase(each, name)]
        if not found:
            raise RecipeError(
                f"components: got {name}, wanted components of model {model.name} ({pipeline['class_name']})"
                f"{nearest(name, list(parts))}"
            )
        if name == pipeline["denoiser"] or (name not in parts and not set(found).isdisjoint(fitting)):
            continue
        if name not in fitting:
            got = f"{entry.recipe or 'weights'} for {', '.join(parts[each]['class_name'] for each in found)}"
            wanted = ", ".join([pipeline["denoiser"], *fitting])
            raise RecipeError(f"components.{name}: got {got}, which stays in full precision, wanted one of {wanted}")
