"""The temporal information block: which layers it has, and that its program is what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.conditioning import conditioning_fields
from quant_core.diffusion.denoiser import call_denoiser, sample_shape
from quant_core.inspect.temporal import TemporalLayer, trace_temporal
from quant_core.nn.layers import QUANTIZABLE

Make = Callable[[str], nn.Module]
TOKENS = {"img_ids": (16, 3), "txt_ids": (5, 3)}


def draw_call(model: nn.Module, seed: int, rows: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw a sample and conditioning; 16 latent tokens where those are packed, 5 of text."""
    generator = torch.Generator().manual_seed(seed)
    conditioning = {}
    for key, field in conditioning_fields(model).items():
        shape = TOKENS.get(key) or (rows, *(5 if size == 77 else size for size in field.shape))
        conditioning[key] = torch.arange(rows) if field.classes else torch.randn(shape, generator=generator)
    return torch.randn(rows, *sample_shape(model, 16), generator=generator), conditioning


def layer_inputs(model: nn.Module, x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: seen.setdefault(name, []).append(args[0].clone())

    layers = {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        call_denoiser(model, x, t, conditioning)
    for handle in handles:
        handle.remove()
    return seen


def layer_outputs(
    model: nn.Module, names: list[str], x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args, y: outputs.update({name: y.clone()})

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        call_denoiser(model, x, t, conditioning)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.fixture
def served(any_model: nn.Module) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    x, conditioning = draw_call(any_model, 0)
    return any_model, x, torch.tensor([700.0, 300.0]), conditioning


def test_the_block_is_what_depends_on_the_timestep_and_not_on_the_sample(
    served: tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]],
) -> None:
    model, x, t, conditioning = served
    found = trace_temporal(model, x, t, conditioning).layers
    here = layer_inputs(model, x, t, conditioning)
    elsewhere, later = (layer_inputs(model, *call) for call in ((x + 1, t, conditioning), (x, t - 99, conditioning)))
    expected = {
        name
        for name, (first, *_) in here.items()
        if torch.equal(first, elsewhere[name][0])
        and not torch.equal(first, later[name][0])
        and first.numel() == len(x) * first.shape[-1]
    }
    assert set(found) == expected
    assert len(found) >= 3


def test_conditions_are_what_else_changes_a_layers_input(
    served: tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]],
) -> None:
    model, x, t, conditioning = served
    found = trace_temporal(model, x, t, conditioning).layers
    here = layer_inputs(model, x, t, conditioning)
    for key, value in conditioning.items():
        other = value.flip(0) if value.dtype == torch.long else value + 1
        changed = layer_inputs(model, x, t, conditioning | {key: other})
        for name, layer in found.items():
            assert (key in layer.conditions) != torch.equal(here[name][0], changed[name][0])


@torch.no_grad()
def test_features_are_all_that_the_rest_of_the_network_reads(
    served: tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]],
) -> None:
    model, x, t, conditioning = served
    found = trace_temporal(model, x, t, conditioning).layers
    wanted = call_denoiser(model, x, t, conditioning)
    outputs = layer_outputs(model, list(found), x, t, conditioning)
    fixed: dict[str, Tensor] = {}
    for name in found:
        model.get_submodule(name).register_forward_hook(lambda _, a, y, name=name: fixed.get(name, y))
    features = {name: outputs[name] for name, layer in found.items() if layer.is_feature}
    fixed |= features | {name: torch.zeros_like(y) for name, y in outputs.items() if name not in features}
    assert torch.equal(call_denoiser(model, x, t, conditioning), wanted)
    for name, value in features.items():
        fixed[name] = value + 1
        assert not torch.equal(call_denoiser(model, x, t, conditioning), wanted)
        fixed[name] = value


@torch.no_grad()
def test_the_program_computes_what_the_model_does(
    served: tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]],
) -> None:
    model, x, t, conditioning = served
    trace = trace_temporal(model, x, t, conditioning)
    layers = {name: model.get_submodule(name) for name in trace.layers}
    outputs = layer_outputs(model, list(layers), x + 1, t, conditioning)
    ran = trace.program.run(layers)
    assert all(torch.equal(ran[name], outputs[name]) for name in layers)
    # What an inner layer gives reaches every layer that names it as a source, and no other.
    first = next(iter(layers))
    changed = trace.program.run(layers | {first: lambda x: layers[first](x) + 1})
    reached = {name for name in layers if not torch.equal(ran[name], changed[name])}
    expected = {first}
    for name, layer in trace.layers.items():
        if expected & set(layer.sources):
            expected.add(name)
    assert reached == expected


def test_a_unet_by_hand(tiny_model: Make) -> None:
    model = tiny_model("unet")
    found = trace_temporal(model, *_call(model)).layers
    projections = [name for name in found if name.endswith("time_emb_proj")]
    assert len(projections) == 8
    assert found["time_embedding.linear_1"] == TemporalLayer((), (), False)
    assert found["time_embedding.linear_2"] == TemporalLayer(("time_embedding.linear_1",), (), False)
    for name in projections:
        assert found[name] == TemporalLayer(("time_embedding.linear_2",), ("class_labels",), True)
    assert len(found) == 10


def test_transformers_by_hand(tiny_model: Make) -> None:
    model = tiny_model("pixart")
    found = trace_temporal(model, *_call(model)).layers
    embedder = "adaln_single.emb.timestep_embedder"
    assert list(found) == [f"{embedder}.linear_1", f"{embedder}.linear_2", "adaln_single.linear"]
    # The final norm reads the embedding itself, the blocks read its projection.
    assert found[f"{embedder}.linear_2"].is_feature
    assert found["adaln_single.linear"].conditions == (
        "added_cond_kwargs.aspect_ratio",
        "added_cond_kwargs.resolution",
    )
    model = tiny_model("dit")
    found = trace_temporal(model, *_call(model)).layers
    # One embedder is called by the first block and once more by the last norm, with the same input.
    assert "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1" in found
    assert found["proj_out_1"].conditions == ("class_labels",)
    # Text that was modulated by the timestep is data.
    model = tiny_model("sd3")
    found = trace_temporal(model, *_call(model)).layers
    assert not any("attn" in name for name in found)


def _call(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x, conditioning = draw_call(model, 1)
    return x, torch.tensor([10.0, 20.0]), conditioning


class _Odd(nn.Module):
    """Calls one layer with two inputs, and looks at a value of the sample."""

    def __init__(self, *, looks: bool) -> None:
        super().__init__()
        self.twice, self.once, self.mix = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.looks = looks

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        wave = torch.sin(timestep[:, None] * torch.arange(4))
        if self.looks and float(sample.sum()) > 1e9:
            wave = wave + sample
        return self.mix(sample) + self.twice(self.twice(wave)) + self.once(wave)


@pytest.mark.parametrize("looks", [False, True])
def test_layers_with_several_inputs_are_left_out_and_values_may_be_looked_at(looks: bool) -> None:
    found = trace_temporal(_Odd(looks=looks), torch.randn(2, 4), torch.tensor([1.0, 2.0]), {})
    assert found.layers == {"once": TemporalLayer((), (), True)}


def test_a_model_without_time_has_no_block() -> None:
    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Any:
            return self.layer(sample)

    assert trace_temporal(Still(), torch.randn(2, 4), torch.tensor([1.0, 2.0]), {}).layers == {}
