"""A quantized denoiser: the plan applied to a float model, in place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quant_core.attention import AttentionQuantizer, quantize_attentions
from quant_core.layers import QuantLayer, quantize_layers
from quant_core.qspec import QuantizationPlan
from quant_core.steps import StepClock, attach_clock


@dataclass(frozen=True, slots=True)
class QuantizedParts:
    """Handles to what `build_quantized` put into a model, by module name."""

    clock: StepClock
    layers: dict[str, QuantLayer]
    attentions: dict[str, AttentionQuantizer]


def build_quantized(model: nn.Module, plan: QuantizationPlan) -> QuantizedParts:
    """Replace the layers and wrap the attentions that `plan` names; codes and ranges are still to be set or loaded.

    Works on a model on the meta device, whose buffers a state dict then fills.
    """
    clock = StepClock(plan.timesteps, plan.unknown_timestep)
    layers = quantize_layers(model, plan.layers, clock)
    attentions = quantize_attentions(model, plan.attentions, clock)
    attach_clock(model, clock)
    return QuantizedParts(clock, layers, attentions)
