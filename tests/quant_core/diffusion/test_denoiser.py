from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant_core.diffusion.conditioning import (
    conditioning_fields,
    draw_conditioning,
    dummy_conditioning,
    interleave,
    is_shared,
    null_conditioning,
)
from quant_core.diffusion.denoiser import call_denoiser, forward_signature, load_denoiser, nest, sample_shape
from quant_core.errors import ConditioningError, DenoiserError

Make = Callable[[str], nn.Module]

SHAPES = {
    "unet": (3, 8, 8),
    "text_unet": (4, 8, 8),
    "sdxl_unet": (4, 8, 8),
    "dit": (4, 8, 8),
    "pixart": (4, 8, 8),
    "sd3": (4, 8, 8),
    "flux": (1024, 4),
}
FIELDS = {
    "unet": {"class_labels"},
    "text_unet": {"encoder_hidden_states"},
    "sdxl_unet": {"encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"},
    "dit": {"class_labels"},
    "pixart": {"encoder_hidden_states", "added_cond_kwargs.resolution", "added_cond_kwargs.aspect_ratio"},
    "sd3": {"encoder_hidden_states", "pooled_projections"},
    "flux": {"encoder_hidden_states", "pooled_projections", "guidance", "img_ids", "txt_ids"},
}


class Line(nn.Module):
    """A 1-D network whose timestep is called `t` and which returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 2, "sample_size": 16}
        self.conv = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * t[:, None, None]


@pytest.fixture
def folder(tiny_model: Make, tmp_path: Path) -> Path:
    tiny_model("unet").save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    return tmp_path


@pytest.mark.parametrize("family", SHAPES)
def test_call_denoiser_predicts_the_shape_of_the_sample(family: str, tiny_model: Make) -> None:
    model = tiny_model(family)
    assert sample_shape(model) == SHAPES[family]
    shape = sample_shape(model, tokens=16)
    row = dummy_conditioning(model)
    conditioning = {key: value if is_shared(key) else torch.cat([value, value]) for key, value in row.items()}
    assert set(conditioning) == FIELDS[family]
    if "img_ids" in conditioning:
        conditioning["img_ids"] = conditioning["img_ids"][:16]
    prediction = call_denoiser(model, torch.randn(2, *shape), 7, conditioning)
    assert prediction.shape == (2, *shape)
    assert prediction.isfinite().all()


def test_call_denoiser_equals_the_model_called_by_hand(tiny_model: Make) -> None:
    model, x = tiny_model("unet"), torch.randn(2, 3, 8, 8)
    labels = torch.tensor([1, 4])
    by_hand = model(x, torch.tensor([5, 9]), labels).sample
    assert torch.equal(call_denoiser(model, x, torch.tensor([5, 9]), {"class_labels": labels}), by_hand)


def test_call_denoiser_drops_learned_variance(tiny_model: Make) -> None:
    model, x, labels = tiny_model("dit"), torch.randn(1, 4, 8, 8), torch.tensor([2])
    whole = model(x, torch.tensor([3]), class_labels=labels).sample
    assert whole.shape[1] == 8
    assert torch.equal(call_denoiser(model, x, 3, {"class_labels": labels}), whole[:, :4])


def test_call_denoiser_takes_any_module() -> None:
    model, x = Line(), torch.randn(2, 2, 16)
    assert sample_shape(model) == (2, 16)
    assert forward_signature(model).timestep == "t"
    assert torch.equal(call_denoiser(model, x, torch.tensor([1.0, 2.0]), {})[1], model.conv(x)[1] * 2)


def test_call_denoiser_refuses_unknown_conditioning() -> None:
    with pytest.raises(DenoiserError, match=r"Line\.forward: got conditioning \['labels'\]"):
        call_denoiser(Line(), torch.zeros(1, 2, 16), 0, {"labels": torch.zeros(1)})


def test_forward_signature_wants_a_timestep() -> None:
    with pytest.raises(DenoiserError, match="wanted a sample and a timestep"):
        forward_signature(nn.Linear(1, 1))


def test_nest_fills_dictionary_arguments() -> None:
    assert nest({"a.b": 1, "a.c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_load_denoiser_finds_the_model_its_scheduler_and_conditioning(folder: Path, tiny_model: Make) -> None:
    save_file({"class_labels": torch.tensor([1])}, folder / "conditioning.safetensors")
    for place in (folder, folder / "unet"):
        found = load_denoiser(place)
        assert found.scheduler_config == {"_class_name": "DDIMScheduler"}
        assert found.conditioning == folder / "conditioning.safetensors"
        assert not found.model.training
    weights = tiny_model("unet").state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_load_denoiser_reads_half_precision_as_float32(tiny_model: Make, tmp_path: Path) -> None:
    tiny_model("unet").half().save_pretrained(tmp_path)  # type: ignore[operator]
    assert {p.dtype for p in load_denoiser(tmp_path).model.parameters()} == {torch.float32}


def test_load_denoiser_finds_a_pulled_artifact(folder: Path) -> None:
    (folder / "unet").rename(folder / "denoiser")
    assert load_denoiser(folder).config["_class_name"] == "UNet2DModel"


def change_config(folder: Path, **entries: object) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_load_denoiser_refuses_what_it_cannot_load(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DenoiserError, match=r"no config\.json"):
        load_denoiser(tmp_path_factory.mktemp("empty"))
    change_config(folder, _class_name="nothing")
    with pytest.raises(DenoiserError, match="got class 'nothing', wanted a model class of diffusers"):
        load_denoiser(folder)
    change_config(folder, _class_name="UNet2DModel", quantization_config={"quant_method": "quantmill"})
    with pytest.raises(DenoiserError, match="got a quantized model"):
        load_denoiser(folder)


def test_load_denoiser_refuses_an_index_that_names_another_class(folder: Path) -> None:
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_denoiser(folder).pipeline == index
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(DenoiserError, match=r"unet: got UNet2DConditionModel, wanted UNet2DModel as in unet/config"):
        load_denoiser(folder)


def test_load_denoiser_is_strict(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "conv_in.weight"}, weights, {"format": "pt"})
    with pytest.raises(DenoiserError, match=r"missing keys .*conv_in\.weight"):
        load_denoiser(folder)
    save_file(tensors | {"extra": torch.zeros(1)}, weights, {"format": "pt"})
    with pytest.raises(DenoiserError, match=r"unexpected keys .*extra"):
        load_denoiser(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DenoiserError, match="weights do not load"):
        load_denoiser(folder)


def test_load_denoiser_never_reads_pickles(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    torch.save(load_file(weights), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(DenoiserError, match="weights do not load"):
        load_denoiser(folder)


def test_draw_conditioning_draws_labels_from_seeds(tiny_model: Make) -> None:
    model = tiny_model("unet")
    labels = draw_conditioning(model, range(200), None)["class_labels"]
    assert set(labels.tolist()) == set(range(5))
    assert torch.equal(draw_conditioning(model, [7, 3], None)["class_labels"], labels[[7, 3]])


def test_draw_conditioning_draws_rows_of_the_file(tiny_model: Make, tmp_path: Path) -> None:
    model, file = tiny_model("sdxl_unet"), tmp_path / "conditioning.safetensors"
    rows = {key: torch.randn(3, *field.shape) for key, field in conditioning_fields(model).items()}
    save_file(rows, file)
    drawn = draw_conditioning(model, range(40), file)
    text = rows["encoder_hidden_states"]
    picked = [next(i for i in range(3) if torch.equal(text[i], row)) for row in drawn["encoder_hidden_states"]]
    assert set(picked) == {0, 1, 2}
    # one row of the file is one prompt: all keys come from the same one
    assert torch.equal(drawn["added_cond_kwargs.time_ids"], rows["added_cond_kwargs.time_ids"][picked])


def test_draw_conditioning_says_what_is_missing(tiny_model: Make, tmp_path: Path) -> None:
    model, file = tiny_model("sd3"), tmp_path / "conditioning.safetensors"
    with pytest.raises(ConditioningError, match="got no encoder_hidden_states, pooled_projections") as caught:
        draw_conditioning(model, [0], None)
    assert caught.value.exit_code == 2
    save_file({"encoder_hidden_states": torch.zeros(2, 77, 12), "pooled_projections": torch.zeros(3, 6)}, file)
    with pytest.raises(ConditioningError, match="wanted the same number"):
        draw_conditioning(model, [0], file)


def test_null_conditioning_takes_the_extra_class(tiny_model: Make) -> None:
    model = tiny_model("dit")
    conditioning = draw_conditioning(model, range(3), None)
    assert null_conditioning(model, conditioning, None, None)["class_labels"].tolist() == [6, 6, 6]
    assert null_conditioning(model, conditioning, None, 2)["class_labels"].tolist() == [2, 2, 2]


def test_null_conditioning_takes_null_rows(tiny_model: Make, tmp_path: Path) -> None:
    model, file = tiny_model("text_unet"), tmp_path / "conditioning.safetensors"
    save_file(
        {"encoder_hidden_states": torch.ones(2, 5, 12), "null.encoder_hidden_states": torch.zeros(1, 5, 12)}, file
    )
    conditioning = draw_conditioning(model, range(3), file)
    both = interleave(conditioning, null_conditioning(model, conditioning, file, None))
    assert both["encoder_hidden_states"].mean(dim=(1, 2)).tolist() == [1, 0, 1, 0, 1, 0]


def test_null_conditioning_needs_something_to_leave_out(tiny_model: Make) -> None:
    model = tiny_model("unet")  # its label embedding has no extra row
    with pytest.raises(ConditioningError, match=r"neither a null class nor null\.\* rows"):
        null_conditioning(model, draw_conditioning(model, [0], None), None, None)


def test_shipped_model_loads(emoji32: Path, tmp_path: Path) -> None:
    shutil.copytree(emoji32, tmp_path / "copy")
    assert sample_shape(load_denoiser(tmp_path / "copy").model) == (3, 32, 32)
