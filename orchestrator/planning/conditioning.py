"""Whether a model can be told all that it must be told, before anything runs: its inspection knows."""

from __future__ import annotations

from orchestrator.db.rows import ModelRow
from orchestrator.errors import RecipeError
from quant_spec.model_files import CONDITIONING_FILE
from quant_spec.sampler import Sampler


def check_conditioning(model: ModelRow, sampler: Sampler) -> None:
    """Refuse a model that lacks conditioning, or guidance that nothing would come of.

    Raises
    ------
    RecipeError
        If the model needs what neither seeds nor its folder give; if a guidance scale other than 1 has no call without
        the condition to compare with; or if the null class is no label of the model.
    """
    if missing := missing_conditioning(model):
        raise RecipeError(
            f"model {model.name} ({model.class_name}): got no {', '.join(missing)}, wanted {CONDITIONING_FILE} "
            "beside the model, one row per prompt"
        )
    labels = model.inspection["label_count"]
    null = sampler.null_class
    if null is not None and not (labels is not None and null < labels):
        wanted = "null, as the model has no class labels" if labels is None else f"a label, 0 to {labels - 1}"
        raise RecipeError(f"sampler.null_class: got {null} for model {model.name}, wanted {wanted}")
    scale, nulls = sampler.guidance_scale, model.inspection["null_conditioning"]
    if scale is not None and sampler.is_guided and null is None and not nulls:
        named = "" if labels is None else "sampler.null_class, or "
        raise RecipeError(
            f"sampler.guidance_scale: got {scale:g}, but nothing of model {model.name} stands for no "
            f"condition; wanted 1, or {named}rows null.* in {CONDITIONING_FILE}"
        )


def missing_conditioning(model: ModelRow) -> list[str]:
    """Return what the model needs, by forward keyword, that is neither drawn from seeds nor in its folder."""
    return list(model.inspection["missing_conditioning"])
