from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from quant_core.inspect.inspection import describe_layers, inspect_model
from quant_core.inspect.pipeline import describe_pipeline

EMOJI_SD = Path(__file__).parents[3] / "examples" / "models" / "emoji-sd"

Make = Callable[[str], nn.Module]


def inspect(model: nn.Module, conditioning: Path | None = None) -> dict:
    return inspect_model(Denoiser(model, {}, None, conditioning))


def test_inspect_model_is_json_that_adds_up(any_model: nn.Module) -> None:
    found = inspect(any_model)
    assert json.loads(json.dumps(found)) == found
    assert found["parameters"] == sum(p.numel() for p in any_model.parameters())
    assert found["weights_bytes"] == 4 * found["parameters"]
    assert set(found["layers"]) == {layer for unit in found["units"] for layer in unit["layers"]}
    assert set(found["attentions"]) == {name for unit in found["units"] for name in unit["attention"]}
    layers = sum(layer["macs"] for layer in found["layers"].values())
    attentions = sum(attention["macs"] for attention in found["attentions"].values())
    assert round(found["forward_gmacs"] * 1e9) == layers + attentions
    assert round(sum(unit["gmacs"] for unit in found["units"]) * 1e9) == layers + attentions
    depths = [unit["depth"] for unit in found["units"]]
    assert all(0 < depth <= 1 for depth in depths)
    for unit in found["units"]:
        shapes = [found["layers"][name]["shape"] for name in unit["layers"]]
        assert unit["weights"] == sum(torch.Size(shape).numel() for shape in shapes)
        assert unit["hessian_bytes"] == sum(4 * torch.Size(shape[1:]).numel() ** 2 for shape in shapes)
        assert unit["input_bytes"] > 0
        assert unit["output_bytes"] > 0


def test_layers_alone_are_those_of_the_whole_description(any_model: nn.Module) -> None:
    found, alone = inspect(any_model), describe_layers(Denoiser(any_model, {}, None, None))
    assert list(alone) == ["layers", "attentions"]
    assert json.dumps(alone) == json.dumps({name: found[name] for name in alone})


def test_inspect_model_counts_a_unet_by_hand(tiny_model: Make) -> None:
    found = inspect(tiny_model("unet"))
    units = {unit["name"]: unit for unit in found["units"]}
    assert found["class_name"] == "UNet2DModel"
    assert found["sample_shape"] == [3, 8, 8]
    assert found["conditioning"] == {"class_labels": 5}
    conv_in = {"type": "Conv2d", "shape": [8, 3, 3, 3], "macs": 8 * 8 * 8 * 27, "split": None}
    assert found["layers"]["conv_in"] == conv_in
    assert units["conv_in"]["input_bytes"] == 4 * 3 * 64
    assert units["conv_in"]["output_bytes"] == 4 * 8 * 64
    assert units["conv_in"]["hessian_bytes"] == 4 * 27**2
    assert found["layers"]["down_blocks.1.attentions.0.to_q"]["macs"] == 16 * 16 * 16
    # 16 tokens of width 16: query x key and probabilities x value
    assert found["attentions"]["down_blocks.1.attentions.0"]["macs"] == 2 * 16 * 16 * 16
    assert found["layers"]["up_blocks.1.resnets.0.conv_shortcut"]["split"] == [16, 8]
    # a residual block reads its features and the time embedding (32 wide)
    assert units["down_blocks.0.resnets.0"]["input_bytes"] == 4 * (8 * 64 + 32)
    assert units["conv_out"]["depth"] == 1.0


def test_inspect_model_counts_cross_attention(tiny_model: Make) -> None:
    found = inspect(tiny_model("text_unet"))
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert found["attentions"][f"{block}.attn1"]["macs"] == 2 * 64 * 64 * 8
    assert found["attentions"][f"{block}.attn2"]["macs"] == 2 * 64 * 77 * 8
    assert found["conditioning"] == {"encoder_hidden_states": [77, 12]}


def test_inspect_model_uses_the_prompts_that_are_there(tiny_model: Make, tmp_path: Path) -> None:
    model, file = tiny_model("text_unet"), tmp_path / "conditioning.safetensors"
    save_file({"encoder_hidden_states": torch.randn(3, 10, 12)}, file)
    found = inspect(model, file)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert found["attentions"][f"{block}.attn2"]["macs"] == 2 * 64 * 10 * 8


def test_inspect_model_counts_groups() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"in_channels": 4, "sample_size": 4}
            self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.point = nn.Conv2d(4, 4, 1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.point(self.deep(sample))

    found = inspect(Grouped())
    assert found["layers"]["deep"]["macs"] == 4 * 16 * 9
    assert {unit["name"]: unit["hessian_bytes"] for unit in found["units"]} == {"deep": 4 * 4 * 81, "point": 4 * 16}


def test_inspect_shipped_model(emoji32: Path) -> None:
    found = inspect_model(load_denoiser(emoji32))
    assert found["parameters"] == 4319219
    assert len(found["units"]) == 27
    assert found["units"][-1]["name"] == "conv_out"


def test_inspect_records_scheduler_and_kind_of_samples(tiny_model: Make) -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": float("-inf"), "trained_betas": None}
    found = inspect_model(Denoiser(tiny_model("unet"), {}, config, None))
    assert found["scheduler"] == config | {"lambda_min_clipped": "-inf"}
    json.dumps(found, allow_nan=False)
    assert found["samples"] == "pixels"
    bare = inspect_model(Denoiser(tiny_model("unet"), {}, None, None, {"vqvae": ["diffusers", "VQModel"]}))
    assert (bare["scheduler"], bare["samples"]) == (None, "latents")
    assert inspect_model(Denoiser(tiny_model("unet"), {}, None, None, {"vae": [None, None]}))["samples"] == "pixels"


def test_a_pipeline_of_an_unknown_class_says_so_and_not_where_it_lay(tmp_path: Path) -> None:
    folder = shutil.copytree(EMOJI_SD, tmp_path / "model")
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "NoSuchPipeline"}))
    facts, call = describe_pipeline(load_denoiser(folder))
    assert call is None
    assert facts["problem"].startswith("model_index.json: got 'NoSuchPipeline', wanted a pipeline of diffusers")
