"""Text encoder: round the weights of a transformers model to packed codes, weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from quant_spec.passes.round import RoundFit
from quant_spec.planned import Layer
from quant_spec.task import Source, TaskInputs, TaskKind, UnitsParams

ENCODER = "encoder"


class Params(RoundFit, UnitsParams):
    """The component, the format of its Linear layers, and how their weights are rounded."""

    component: Annotated[str, Field(pattern=r"^([A-Za-z0-9_-]+)?$", max_length=200)] = Field(
        default="", description="Folder of the encoder in the model's tree; empty where the tree is the encoder's own."
    )
    layer: Layer = Field(description="Format of every Linear layer; its input stays in full precision.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree; safetensors of what the encoder is called with: `input_ids` (n, tokens), `attention_mask`."""

    model: Source
    prompts: Source


KIND = TaskKind(
    "text_encoder", 1, "workers.tasks.text_encoder:run", Params, Inputs, (ENCODER,), gpu=True, trees=(ENCODER,)
)
