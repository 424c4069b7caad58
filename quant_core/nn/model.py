"""A quantized denoiser: a model in floating point whose layers are replaced, in place, by those of a format."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from quant_core.nn.askable import keep_askable
from quant_core.nn.attention import AttentionQuantizer, quantize_attentions
from quant_core.nn.feature_table import FeatureTable, Unserved, replace_features
from quant_core.nn.layers import QuantLayer, quantize_layers
from quant_core.nn.steps import StepClock, attach_clock
from quant_spec.formats import ModelFormat

#: What stands for layers of the original.
PACKED_MODULES: tuple[type[nn.Module], ...] = (QuantLayer, FeatureTable, Unserved)


@dataclass(frozen=True, slots=True)
class QuantizedParts:
    """Handles to what `build_quantized` put into a model, by module name."""

    clock: StepClock
    layers: dict[str, QuantLayer]
    attentions: dict[str, AttentionQuantizer]
    features: dict[str, FeatureTable] = field(default_factory=dict)

    def set_timestep(self, timestep: Tensor, label: Tensor | None) -> None:
        """Set the timestep of the samples that parts of the model run on next, outside of a forward of the whole.

        Parameters
        ----------
        timestep : Tensor, shape (B,)
        label : Tensor, shape (B,), or None
            Class labels, which only tables of features need.
        """
        self.clock.set_timestep(timestep)
        labels = max((table.spec.labels for table in self.features.values()), default=1)
        if labels > 1:
            self.clock.set_label(label, labels)


def build_quantized(model: nn.Module, model_format: ModelFormat) -> QuantizedParts:
    """Replace the layers and wrap the attentions that the format names; codes, ranges and tables are still to be set.

    Works on a model on the meta device too, whose buffers a state dict then fills.
    """
    clock = StepClock(model_format.timesteps, model_format.unknown_timestep, model_format.num_inference_steps)
    layers = quantize_layers(model, model_format.layers, clock)
    attentions = quantize_attentions(model, model_format.attentions, clock)
    features = replace_features(model, model_format.features, model_format.unserved, clock)
    attach_clock(model, clock, max((spec.labels for spec in model_format.features.values()), default=1))
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        keep_askable(model, PACKED_MODULES)
    return QuantizedParts(clock, layers, attentions, features)
