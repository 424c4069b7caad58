"""Components: text encoders with packed weights, and the pipeline's tree and the embeddings that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import SMALL, WORKER_BYTES, Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing, Source
from orchestrator.planning.formats import weights_alone
from orchestrator.planning.passes.encode import encode_cost, encoding, told_by_encoders
from quant_spec.components import ComponentRecipe, text_encoders
from quant_spec.enums import RoundingMethod
from quant_spec.prompts import PromptPart
from quant_spec.task import Seeds
from quant_spec.tasks import components as tree
from quant_spec.tasks import encode, text_encoder


def components(draft: Draft) -> Drawing:
    """Leave the tree that the packed denoiser samples in, and what its text encoders make of the evaluation's prompts.

    Calibration is told what the full-precision encoders make of its prompts: recipes that differ here share it.
    """
    whole, recipe = draft.model.pipeline, draft.recipe
    if whole is None or draft.prompts is None:
        return draft
    chosen = text_encoders(recipe.components, whole.text_encoders)
    if not chosen:
        return draft
    packed: dict[str, Source] = {}
    for name, (entry, weights) in chosen.items():
        config = entry.passes.round
        params = text_encoder.Params.of(
            config,
            component=name,
            layer=weights_alone(weights),
            seed=recipe.seed,
            **_calls(draft, config.method),
        )
        inputs: text_encoder.Inputs[Source] = text_encoder.Inputs(draft.model.digest, draft.prompts)
        cost = text_encoder_cost(draft.costs, name, entry)
        node = draft.node(text_encoder.KIND, params, inputs, cost, name)
        packed[name] = TaskRef(node.id, text_encoder.ENCODER)
        yield node
    made = tree.Inputs(draft.model.digest, tuple(packed.values()))
    node = draft.node(tree.KIND, tree.Params(components=tuple(packed)), made, SMALL, ", ".join(packed))
    yield node
    draft = replace(draft, whole=TaskRef(node.id, tree.PIPELINE))
    if not whole.encodes:
        return draft
    section = recipe.evaluation
    params_, inputs_ = encoding(draft, PromptPart.EVALUATION, section.first_seed, section.seeds)
    node = draft.node(
        encode.KIND, params_, inputs_, encode_cost(draft.costs, section.seeds), "evaluation, quantized encoders"
    )
    yield node
    return replace(draft, packed_embeddings=TaskRef(node.id, encode.EMBEDDINGS))


def _calls(draft: Draft, method: RoundingMethod) -> Mapping[str, object]:
    """Return which prompts an encoder is calibrated on, and how; nothing where weights are rounded to nearest."""
    if method is not RoundingMethod.CLOSED_FORM:
        return {}
    section = draft.recipe.calibration
    return {
        "sampler": told_by_encoders(draft.sampler),
        "seeds": Seeds(first=section.first_seed, count=section.seeds),
        "forward_batch_size": section.batch_size,
    }


def text_encoder_cost(costs: Costs, name: str, entry: ComponentRecipe) -> Cost:
    """Prompts encoded twice, to see what the encoder is called with and inside of it; then closed-form rounding."""
    whole = costs.model.pipeline
    if whole is None:
        raise ValueError("components: got a bare denoiser, wanted a whole pipeline")
    weights = whole.text_encoders[name]
    config, work = entry.passes.round, 0.0
    if config.method is RoundingMethod.CLOSED_FORM:
        work = 2 * min(config.samples, costs.recipe.calibration.seeds) * whole.encode_gmacs + giga(weights * ROUND)
    return Cost(work, int(WORKER_BYTES + whole.other_bytes + 4 * weights + costs.cached(4 * weights)))


#: MACs of one weight rounded in closed form, in a model whose layers' shapes are not known.
ROUND = 20_000.0
