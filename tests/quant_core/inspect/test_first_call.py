"""What a model that cannot be called is told, and what of its conditioning is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_core.diffusion.denoiser import Denoiser
from quant_core.errors import ConditioningError, DenoiserError
from quant_core.inspect.first_call import describe_needs
from quant_core.inspect.inspection import inspect_model

Make = Callable[[str], nn.Module]


@pytest.fixture
def conditioned(tmp_path: Path) -> Callable[..., Denoiser]:
    """Put a conditioning file beside a model; "null_x" is the key "null.x"."""

    def beside(model: nn.Module, **tensors: Tensor) -> Denoiser:
        file = tmp_path / "conditioning.safetensors"
        save_file({key.replace("null_", "null."): value for key, value in tensors.items()}, file)
        return Denoiser(model, {}, None, file)

    return beside


def classes(**config: object) -> nn.Module:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    size = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    return UNet2DModel(**size, **blocks, **config)


def test_a_forward_that_wants_more_than_its_config_says() -> None:
    class Voice(nn.Module):
        config: ClassVar[dict[str, Any]] = {"in_channels": 4, "sample_size": 4}

        def forward(self, sample: Tensor, timestep: Tensor, voice: Tensor) -> Tensor:
            return sample * voice

    denoiser = Denoiser(Voice(), {}, None, None)
    assert describe_needs(denoiser)["missing_conditioning"] == ["voice"]
    with pytest.raises(ConditioningError, match=r"got no voice, wanted conditioning\.safetensors"):
        inspect_model(denoiser)


def test_whatever_a_forward_raises_is_told_with_what_it_was_called_with() -> None:
    class Strange(nn.Module):
        config: ClassVar[dict[str, Any]] = {"in_channels": 4, "sample_size": 4}

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            raise LookupError("no such thing\nand more")

    with pytest.raises(
        DenoiserError, match=r"Strange cannot be called with sample \(1, 4, 4, 4\): got LookupError \(no such"
    ):
        inspect_model(Denoiser(Strange(), {}, None, None))


def test_a_lack_of_memory_is_not_the_model_s_fault() -> None:
    class Large(nn.Module):
        config: ClassVar[dict[str, Any]] = {"in_channels": 4, "sample_size": 4}

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    with pytest.raises(RuntimeError, match="allocate"):
        inspect_model(Denoiser(Large(), {}, None, None))


def test_learned_variance_is_no_concatenated_input(tiny_model: Make) -> None:
    assert inspect_model(Denoiser(tiny_model("dit"), {}, None, None))["sample_shape"] == [4, 8, 8]


@pytest.mark.parametrize(("kind", "row"), [("timestep", ()), ("identity", (32,))])
def test_class_embeddings_that_are_no_labels(
    conditioned: Callable[..., Denoiser], kind: str, row: tuple[int, ...]
) -> None:
    model = classes(class_embed_type=kind)
    needs = describe_needs(Denoiser(model, {}, None, None))
    assert needs == {"missing_conditioning": ["class_labels"], "null_conditioning": [], "label_count": None}
    told = inspect_model(conditioned(model, class_labels=torch.rand(3, *row)))
    assert told["missing_conditioning"] == []
    assert told["conditioning"]["class_labels"] == list(row)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 3, 4]), torch.tensor([-1]), torch.rand(3), torch.zeros(3, 2).long()]
)
def test_labels_that_the_model_does_not_embed(conditioned: Callable[..., Denoiser], labels: Tensor) -> None:
    denoiser = conditioned(classes(num_class_embeds=4), class_labels=labels)
    with pytest.raises(ConditioningError, match=r"class_labels: got .* wanted a list of integers from 0 to 3"):
        inspect_model(denoiser)


def test_null_rows(tiny_model: Make, conditioned: Callable[..., Denoiser]) -> None:
    model, rows = tiny_model("text_unet"), torch.randn(3, 5, 12)
    fits = conditioned(model, encoder_hidden_states=rows, null_encoder_hidden_states=torch.zeros(1, 5, 12))
    assert inspect_model(fits)["null_conditioning"] == ["encoder_hidden_states"]
    longer = conditioned(model, encoder_hidden_states=rows, null_encoder_hidden_states=torch.zeros(1, 7, 12))
    with pytest.raises(ConditioningError, match=r"shape \(7, 12\) and rows \(5, 12\)"):
        inspect_model(longer)


def test_an_extra_class_stands_for_none(tiny_model: Make) -> None:
    found = describe_needs(Denoiser(tiny_model("dit"), {}, None, None))
    assert found == {"missing_conditioning": [], "null_conditioning": ["class_labels"], "label_count": 7}
    plain = describe_needs(Denoiser(classes(num_class_embeds=4), {}, None, None))
    assert plain == {"missing_conditioning": [], "null_conditioning": [], "label_count": 4}
