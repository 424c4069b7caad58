"""A layer whose outputs are looked up: features that depend on the trajectory step (and the class label) alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quant_core.nn.layers import replace_module
from quant_core.nn.ranges import SCALE_FLOOR
from quant_core.nn.steps import StepClock
from quant_spec.errors import QuantizationError
from quant_spec.formats import FeatureSpec


class FeatureTable(nn.Module):
    """Stands for a Linear layer and gives its recorded outputs, whatever it is fed.

    Attributes
    ----------
    values : Tensor, shape (S * labels, C_out), dtype uint8 (8 bits) or bfloat16 (16 bits)
        Row step * labels + label.
    scale, offset : Tensor, shape (C_out,), dtype float32
        Only at 8 bits: output = code * scale + offset.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, layer: nn.Linear, spec: FeatureSpec, clock: StepClock) -> None:
        super().__init__()
        self.spec = spec
        self.clock = clock
        self.dtype, device = layer.weight.dtype, layer.weight.device
        shape = (clock.steps * spec.labels, layer.out_features)
        if spec.bits == 8:
            self.register_buffer("values", torch.zeros(shape, dtype=torch.uint8, device=device))
            self.register_buffer("scale", torch.ones(layer.out_features, device=device))
            self.register_buffer("offset", torch.zeros(layer.out_features, device=device))
        else:
            self.register_buffer("values", torch.zeros(shape, dtype=torch.bfloat16, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for the samples of `x`, shape (B, ..., C_in) -> (B, ..., C_out), one vector a sample."""
        rows = self.clock.rows(self.spec.labels).to(self.values.device)
        values = self.values.index_select(0, rows.reshape(-1)).float()
        if self.spec.bits == 8:
            values = values * self.scale + self.offset
        shape = (*x.shape[:-1], values.shape[-1])
        values = values.reshape(-1, *(1,) * (x.dim() - 2), values.shape[-1])
        return values.expand(shape).to(self.dtype)

    def extra_repr(self) -> str:
        """Describe the table in one line."""
        return f"{tuple(self.values.shape)}, {self.spec.bits} bits"


class Unserved(nn.Module):
    """Stands for a Linear layer that was dropped, as only replaced layers read its outputs: returns zeros."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.dtype = layer.out_features, layer.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros."""
        return x.new_zeros((*x.shape[:-1], self.out_features), dtype=self.dtype)


def encode_features(features: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the tensors of a `FeatureTable` for outputs of shape (rows, C_out), dtype float32, by name."""
    if bits == 16:
        return {"values": features.to(torch.bfloat16)}
    low, high = features.amin(dim=0), features.amax(dim=0)
    scale = ((high - low) / 255).clamp(min=SCALE_FLOOR)
    codes = torch.round((features - low) / scale).clamp(0, 255)
    return {"values": codes.to(torch.uint8), "scale": scale, "offset": low}


def decode_features(table: Mapping[str, Tensor]) -> Tensor:
    """Return the outputs that a table holds, shape (rows, C_out), dtype float32."""
    values = table["values"].float()
    return values * table["scale"] + table["offset"] if "scale" in table else values


def replace_features(
    model: nn.Module, features: Mapping[str, FeatureSpec], unserved: Sequence[str], clock: StepClock
) -> dict[str, FeatureTable]:
    """Replace the layers `features` of `model` by tables, still zero, and drop the layers `unserved`, in place.

    Raises
    ------
    QuantizationError
        If a name is not a Linear layer of the model.
    """
    made = {}
    for name in (*features, *unserved):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise QuantizationError(f"feature table {name}: got {type(layer).__name__}, wanted Linear")
        if name in features:
            made[name] = FeatureTable(layer, features[name], clock)
            replace_module(model, name, made[name])
        else:
            replace_module(model, name, Unserved(layer))
    return made
