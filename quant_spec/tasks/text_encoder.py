"""Text encoder: round the weights of a pipeline's text encoder to packed codes, weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from quant_spec.enums import RoundingMethod
from quant_spec.passes.round import RoundFit
from quant_spec.planned import Layer
from quant_spec.record import Count, Seed
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

ENCODER = "encoder"


class Params(RoundFit, TaskParams):
    """The component, the format of its Linear layers, how their weights are rounded, and on which prompts."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("method", RoundingMethod.CLOSED_FORM): frozenset(
            {"samples", "positions", "damping", "correct_bias", "sampler", "seeds", "forward_batch_size"}
        ),
    }

    component: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=200)] = Field(
        description="Name of the encoder in the pipeline."
    )
    layer: Layer = Field(description="Format of every Linear layer; its input stays in full precision.")
    seed: Seed = Field(description="Of the choice of positions.")
    sampler: Sampler = Field(
        default=Sampler(), description="How the pipeline is called, as far as it decides what is encoded."
    )
    seeds: Seeds = Field(
        default=Seeds(first=0, count=1), description="Whose calibration prompts are encoded; `samples` of them at most."
    )
    forward_batch_size: Count = Field(default=32, description="Prompts encoded at once.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The pipeline's tree and a file of prompts."""

    model: Source
    prompts: Source


KIND = TaskKind(
    "text_encoder", 2, "workers.tasks.text_encoder:run", Params, Inputs, (ENCODER,), gpu=True, trees=(ENCODER,)
)
