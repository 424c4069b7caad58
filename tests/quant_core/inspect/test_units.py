from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.conditioning import dummy_conditioning
from quant_core.diffusion.denoiser import sample_shape
from quant_core.errors import DenoiserError
from quant_core.inspect.trace import Trace, trace_denoiser
from quant_core.inspect.units import Units, find_units, quantizable_layers, unit_names

Make = Callable[[str], nn.Module]

TIME = ["time_embedding.linear_1", "time_embedding.linear_2"]
RESNET = ["conv1", "time_emb_proj", "conv2"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CROSS_BLOCK = [f"attn{i}.{layer}" for i in (1, 2) for layer in ATTENTION] + ["ff.net.0.proj", "ff.net.2"]
JOINT = [
    "norm1.linear",
    "norm1_context.linear",
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
]


def trace(model: nn.Module) -> Trace:
    conditioning = dummy_conditioning(model)
    if "img_ids" in conditioning:
        conditioning["img_ids"] = conditioning["img_ids"][:16]
    return trace_denoiser(model, torch.randn(1, *sample_shape(model, 16)), torch.tensor(3), conditioning)


def discover(model: nn.Module) -> tuple[Units, Trace]:
    traced = trace(model)
    return find_units(model, traced), traced


def layers_of(found: Units, name: str) -> list[str]:
    """Return the layers of a unit without its name."""
    unit = next(unit for unit in found.units if unit.name == name)
    return [layer.removeprefix(f"{name}.") for layer in unit.layers]


def test_every_layer_is_in_exactly_one_unit(any_model: nn.Module) -> None:
    found, _ = discover(any_model)
    placed = [layer for unit in found.units for layer in unit.layers]
    assert len(placed) == len(set(placed))
    assert sorted([*placed, *found.unused]) == sorted(quantizable_layers(any_model))
    assert found.unused == ()
    assert all(layer == unit.name or layer.startswith(f"{unit.name}.") for unit in found.units for layer in unit.layers)


def test_units_are_in_the_order_of_execution(any_model: nn.Module) -> None:
    calls: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, layer in quantizable_layers(any_model).items()
    ]
    found, _ = discover(any_model)
    for handle in handles:
        handle.remove()
    firsts = [min(calls.index(layer) for layer in unit.layers) for unit in found.units]
    assert firsts == sorted(firsts)
    for unit in found.units:
        assert [calls.index(layer) for layer in unit.layers] == sorted(calls.index(layer) for layer in unit.layers)


def test_every_attention_belongs_to_the_unit_that_holds_it(any_model: nn.Module) -> None:
    found, traced = discover(any_model)
    placed = [attention for unit in found.units for attention in unit.attentions]
    assert sorted(placed) == sorted(traced.attentions)
    assert sorted(placed) == sorted(n for n, m in any_model.named_modules() if hasattr(m, "to_q"))
    assert all(name.startswith(unit.name) for unit in found.units for name in unit.attentions)


def test_units_of_a_unet(tiny_model: Make) -> None:
    found, traced = discover(tiny_model("unet"))
    assert [unit.name for unit in found.units] == [
        "time_embedding",
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
        "up_blocks.0.resnets.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.resnets.1",
        "up_blocks.0.attentions.1",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
        "conv_out",
    ]
    assert list(found.units[0].layers) == TIME
    assert layers_of(found, "down_blocks.0.resnets.0") == RESNET
    assert layers_of(found, "up_blocks.1.resnets.0") == [*RESNET, "conv_shortcut"]
    assert layers_of(found, "mid_block.attentions.0") == ATTENTION
    splits = {name: layer.split for name, layer in traced.layers.items() if layer.split}
    assert splits == {
        "up_blocks.0.resnets.0.conv_shortcut": (16, 16),
        "up_blocks.0.resnets.1.conv_shortcut": (16, 8),
        "up_blocks.1.resnets.0.conv_shortcut": (16, 8),
        "up_blocks.1.resnets.1.conv_shortcut": (8, 8),
    }


def test_units_of_a_text_unet(tiny_model: Make) -> None:
    found, traced = discover(tiny_model("text_unet"))
    names = [unit.name for unit in found.units]
    assert len(names) == 25
    here = names.index("down_blocks.0.attentions.0.proj_in")
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert names[here : here + 3] == [names[here], block, "down_blocks.0.attentions.0.proj_out"]
    assert layers_of(found, block) == CROSS_BLOCK
    unit = found.units[here + 1]
    assert unit.attentions == (f"{block}.attn1", f"{block}.attn2")
    assert traced.layers["up_blocks.1.resnets.1.conv_shortcut"].split == (8, 8)


def test_units_of_an_sdxl_unet(tiny_model: Make) -> None:
    found, traced = discover(tiny_model("sdxl_unet"))
    names = [unit.name for unit in found.units]
    assert names[:3] == ["time_embedding", "add_embedding", "conv_in"]
    deep = [name for name in names if name.startswith("mid_block.attentions.0")]
    stem = "mid_block.attentions.0"
    assert deep == [
        f"{stem}.proj_in",
        f"{stem}.transformer_blocks.0",
        f"{stem}.transformer_blocks.1",
        f"{stem}.proj_out",
    ]
    # pooled text and time ids are concatenated; the sine and cosine halves of a timestep embedding are no split
    assert traced.layers["add_embedding.linear_1"].split == (10, 24)
    assert traced.layers["time_embedding.linear_1"].split is None


def test_units_of_a_dit(tiny_model: Make) -> None:
    found, traced = discover(tiny_model("dit"))
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    assert [unit.name for unit in found.units] == ["pos_embed.proj", *blocks, "proj_out_1", "proj_out_2"]
    time = [f"norm1.emb.timestep_embedder.linear_{i}" for i in (1, 2)]
    rest = ["norm1.linear", *(f"attn1.{layer}" for layer in ATTENTION), "ff.net.0.proj", "ff.net.2"]
    assert layers_of(found, blocks[0]) == [*time, *rest]
    # block 0 lends its time embedding to the output head: those two layers run twice
    calls = [event.name for event in traced.events]
    assert [calls.count(f"transformer_blocks.{i}.{time[0]}") for i in (0, 1)] == [2, 1]


def test_units_of_pixart(tiny_model: Make) -> None:
    found, _ = discover(tiny_model("pixart"))
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    expected = ["pos_embed.proj", "adaln_single", "caption_projection", *blocks, "proj_out"]
    assert [unit.name for unit in found.units] == expected
    assert layers_of(found, blocks[1]) == CROSS_BLOCK
    assert layers_of(found, "adaln_single")[-1] == "linear"
    assert len(layers_of(found, "adaln_single")) == 7


def test_units_of_sd3(tiny_model: Make) -> None:
    found, _ = discover(tiny_model("sd3"))
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    ends = ["norm_out.linear", "proj_out"]
    expected = ["pos_embed.proj", "time_text_embed", "context_embedder", *blocks, *ends]
    assert [unit.name for unit in found.units] == expected
    assert layers_of(found, blocks[0])[:8] == JOINT
    assert len(layers_of(found, blocks[0])) == 14
    assert found.units[3].attentions == ("transformer_blocks.0.attn",)


def test_units_of_flux(tiny_model: Make) -> None:
    found, traced = discover(tiny_model("flux"))
    singles = ["single_transformer_blocks.0", "single_transformer_blocks.1"]
    assert [unit.name for unit in found.units] == [
        "x_embedder",
        "time_text_embed",
        "context_embedder",
        "transformer_blocks.0",
        *singles,
        "norm_out.linear",
        "proj_out",
    ]
    assert layers_of(found, "transformer_blocks.0")[:8] == JOINT
    expected = ["norm.linear", "proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v", "proj_out"]
    assert layers_of(found, singles[0]) == expected
    # attention's output and the MLP's are concatenated along the last dimension
    assert traced.layers["single_transformer_blocks.0.proj_out"].split == (16, 64)


class Block(nn.Module):
    """Two convolutions and a shortcut of a concatenation, of any dimension."""

    def __init__(self, conv: type[nn.Module], width: int) -> None:
        super().__init__()
        self.a = conv(2 * width, width, 3, padding=1)
        self.b = conv(width, width, 3, padding=1)
        self.shortcut = conv(2 * width, width, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        joined = torch.cat([x, skip], dim=1)
        return self.b(self.a(joined.relu()).relu()) + self.shortcut(joined)


class Plain(nn.Module):
    """Blocks as attributes and in lists, a layer that never runs, a last layer that is defined first."""

    def __init__(self, conv: type[nn.Module], dims: int) -> None:
        super().__init__()
        self.config = {"in_channels": 2, "sample_size": [8] * dims}
        self.last = conv(4, 2, 1)
        self.first = conv(2, 4, 1)
        self.idle = conv(4, 4, 1)
        self.time = nn.Sequential(nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, 4))
        self.blocks = nn.ModuleList([Block(conv, 4), Block(conv, 4)])
        self.extra = Block(conv, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = skip = self.first(sample)
        x = x + self.time(timestep.float()[:, None]).reshape(-1, 4, *[1] * (x.dim() - 2))
        for block in (*self.blocks, self.extra):
            x = block(x, skip)
        return self.last(x)


class Wrapped(nn.Module):
    """A denoiser that only passes on to another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.config, self.inner = inner.config, inner

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(sample, timestep)


@pytest.mark.parametrize(("conv", "dims"), [(nn.Conv1d, 1), (nn.Conv2d, 2)])
def test_units_of_a_plain_network(conv: type[nn.Module], dims: int) -> None:
    found, traced = discover(Plain(conv, dims))
    names = [unit.name for unit in found.units]
    # a Sequential is no block: its layers are units of their own
    assert names == ["first", "time.0", "time.2", "blocks.0", "blocks.1", "extra", "last"]
    assert found.unused == ("idle",)
    assert layers_of(found, "blocks.0") == ["a", "b", "shortcut"]
    # the shortcut sees the concatenation itself, the convolution beside it sees relu of it
    assert traced.layers["blocks.1.shortcut"].split == (4, 4)
    assert traced.layers["blocks.1.a"].split is None


def test_units_below_a_wrapper_are_the_same() -> None:
    plain = Plain(nn.Conv2d, 2)
    names = [f"inner.{name}" for name in unit_names(plain)]
    assert unit_names(Wrapped(plain)) == names
    assert unit_names(Wrapped(Wrapped(plain))) == [f"inner.{name}" for name in names]


class Tokens(nn.Module):
    """Linear layers only; one reads a concatenation along the last dimension, one along the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 4}
        self.wide = nn.Linear(7, 4)
        self.long = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        wide = self.wide(torch.concat((sample, sample[..., :3]), -1))
        return self.long(torch.cat([wide, sample], dim=1))[:, : sample.shape[1]]


def test_a_split_is_along_the_channels() -> None:
    _, traced = discover(Tokens())
    assert traced.layers["wide"].split == (4, 3)
    assert traced.layers["long"].split is None


def test_find_units_wants_a_layer_that_runs() -> None:
    model = Plain(nn.Conv2d, 2)
    nothing = Trace({}, {}, (), {}, (1,))
    with pytest.raises(DenoiserError, match="Plain: got no Conv or Linear layer that runs"):
        find_units(model, nothing)


def test_trace_leaves_no_hooks(tiny_model: Make) -> None:
    model = tiny_model("unet")
    trace(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
