"""Packed layers answer what code of models asks their parameters for, and add nothing to a file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quant_core.nn.model import build_quantized
from quant_spec.formats import FeatureSpec, LayerSpec, ModelFormat, WeightSpec


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)


class Denoiser(nn.Module):
    _keep_in_fp32_modules = ("embedder",)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.embedder, self.blocks = nn.LayerNorm(4), Embedder(), nn.Sequential(nn.Linear(4, 4))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.norm(sample))


@pytest.fixture
def model() -> Denoiser:
    """Every Linear is packed, one as a table; the norm, in bfloat16, is all that is left."""
    model = Denoiser()
    model.norm.to(torch.bfloat16)
    spec = LayerSpec(WeightSpec(8))
    layers = {"embedder.first": spec, "blocks.0": spec}
    build_quantized(model, ModelFormat(layers, {}, (9.0, 5.0), features={"embedder.second": FeatureSpec(16)}))
    return model


def test_blocks_without_parameters_say_their_dtype(model: Denoiser) -> None:
    assert next(model.blocks.parameters()).dtype is torch.bfloat16
    # diffusers keeps it in float32, whatever the rest is in
    assert next(iter(model.embedder.parameters())).dtype is torch.float32
    assert model.embedder.second.weight.dtype is torch.float32
    assert sum(value.numel() for value in model.blocks.parameters()) == 0


def test_files_are_as_without(model: Denoiser) -> None:
    state = model.state_dict()
    assert not {name for name in state if name.endswith((".weight", ".placeholder"))} - {"norm.weight"}
    twin = copy.deepcopy(model)
    assert twin.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.weight"):
        twin.load_state_dict({name: value for name, value in state.items() if name != "norm.weight"})
