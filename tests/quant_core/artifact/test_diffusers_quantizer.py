from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quant_core
from quant_core.artifact.diffusers_quantizer import QuantmillConfig, QuantmillQuantizer, register
from quant_core.artifact.folder import WEIGHTS_FILE, write_artifact
from quant_core.errors import ArtifactError
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QuantLayer
from quant_spec.enums import ActivationMode
from quant_spec.formats import ModelFormat
from quant_spec.quantization_config import QUANT_METHOD, quantization_config

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]


def pack(model: nn.Module, model_format: ModelFormat, folder: Path) -> Path:
    write_artifact(model, json.loads(model.to_json_string()), quantization_config(model_format), None, folder)
    return folder


def predict(model: nn.Module, timestep: float = 500) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x.to(model.dtype), timestep, torch.tensor([0, 3])).sample


@pytest.fixture
def simulated(tiny_model: Make, quantize_model: Quantize) -> tuple[nn.Module, ModelFormat]:
    model = tiny_model("unet")
    return model, quantize_model(model)


@pytest.fixture
def packed(simulated: tuple[nn.Module, ModelFormat], tmp_path: Path) -> Path:
    return pack(*simulated, tmp_path / "packed")


def test_import_registers_the_method() -> None:
    assert AUTO_QUANTIZER_MAPPING[QUANT_METHOD] is QuantmillQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] is QuantmillConfig
    assert callable(quant_core.load_quantized)
    before = dict(AUTO_QUANTIZER_MAPPING)
    register()
    assert before == AUTO_QUANTIZER_MAPPING


def test_plain_from_pretrained_equals_the_simulated_model(
    simulated: tuple[nn.Module, ModelFormat], packed: Path
) -> None:
    model = UNet2DModel.from_pretrained(packed)
    assert isinstance(model.conv_in, QuantLayer)
    assert not any(t.is_meta for t in [*model.buffers(), *model.parameters()])
    for timestep in (900, 500, 100):
        assert torch.equal(predict(model, timestep), predict(simulated[0], timestep))
    assert not torch.equal(predict(model, 900), predict(model, 100))


@pytest.mark.parametrize(
    ("mode", "weight"),
    [
        (ActivationMode.STATIC, {"bits": 3}),
        (ActivationMode.DYNAMIC_SAMPLE, {"bits": 5, "symmetric": True}),
        (ActivationMode.DYNAMIC_TOKEN, {"bits": 2, "granularity": "per_group", "group_size": 6}),
        (ActivationMode.PER_STEP, {"bits": 8}),
        (ActivationMode.PER_STEP, {"bits": 4, "granularity": "per_group", "group_size": 5, "group_scale": "integer"}),
        (ActivationMode.STATIC, {"bits": 6, "granularity": "per_group", "group_size": 64, "group_scale": "integer"}),
    ],
)
def test_every_format_loads_bit_for_bit(
    tiny_model: Make, quantize_model: Quantize, tmp_path: Path, mode: ActivationMode, weight: dict[str, object]
) -> None:
    model = tiny_model("unet")
    folder = pack(model, quantize_model(model, mode, **weight), tmp_path / "packed")
    assert torch.equal(predict(UNet2DModel.from_pretrained(folder)), predict(model))


def test_every_family_loads(any_model: nn.Module, quantize_model: Quantize, tmp_path: Path) -> None:
    folder = pack(any_model, quantize_model(any_model), tmp_path / "packed")
    family: Any = type(any_model)
    loaded = family.from_pretrained(folder)
    want = any_model.state_dict()
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == {n: v.dtype for n, v in want.items()}
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())
    assert not any(t.is_meta for t in [*loaded.buffers(), *loaded.parameters()])


@pytest.mark.parametrize("argument", ["torch_dtype", "dtype"])
def test_a_lower_dtype_leaves_the_packed_tensors_alone(packed: Path, argument: str) -> None:
    stored = UNet2DModel.from_pretrained(packed).state_dict()
    model = UNet2DModel.from_pretrained(packed, **{argument: torch.bfloat16})
    assert model.dtype == torch.bfloat16
    kinds = (QuantLayer, ActivationQuantizer)
    own = {f"{n}.{b}" for n, m in model.named_modules() if isinstance(m, kinds) for b, _ in m.named_buffers()}
    assert "conv_in.act_quantizers.0.scale" in own
    for name, value in model.state_dict().items():
        if name in own:
            assert value.dtype == stored[name].dtype
            assert torch.equal(value, stored[name])
        else:
            assert value.dtype == torch.bfloat16
    half = predict(model)
    assert half.dtype == torch.bfloat16
    full = predict(UNet2DModel.from_pretrained(packed))
    assert (half.float() - full).norm() < 0.1 * full.norm()


def test_save_pretrained_round_trips_bit_for_bit(packed: Path, tmp_path: Path) -> None:
    model = UNet2DModel.from_pretrained(packed)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (packed / WEIGHTS_FILE).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (packed, tmp_path / "again")]
    assert configs[1].pop("_name_or_path", None) in (None, str(packed))
    assert configs[0] == configs[1]
    again = UNet2DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(predict(again), predict(model))


def test_it_moves_between_devices_but_not_dtypes(packed: Path) -> None:
    model = UNet2DModel.from_pretrained(packed).to("cpu")
    with pytest.raises(ValueError, match="quantized model"):
        model.to(torch.float16)


def test_it_samples_inside_a_pipeline(tiny_model: Make, quantize_model: Quantize, tmp_path: Path) -> None:
    config = dict(tiny_model("unet").config) | {"num_class_embeds": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DModel.from_config(config)
    pack(model, quantize_model(model, ActivationMode.DYNAMIC_SAMPLE), tmp_path / "packed")
    unet = UNet2DModel.from_pretrained(tmp_path / "packed")
    DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=1000)).save_pretrained(tmp_path / "pipeline")
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(pipeline.unet.conv_in, QuantLayer)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for unet in (pipeline.unet, model):
        pipeline.unet = unet
        generator = torch.Generator().manual_seed(3)
        images.append(pipeline(batch_size=2, generator=generator, num_inference_steps=3, output_type="np").images)
    assert images[0].shape == (2, 8, 8, 3)
    assert (images[0] == images[1]).all()


def test_dequantize_gives_a_plain_model(packed: Path, tiny_model: Make, tmp_path: Path) -> None:
    quantized = UNet2DModel.from_pretrained(packed)
    weights = {name: layer.weight for name, layer in quantized.named_modules() if isinstance(layer, QuantLayer)}
    plain = quantized.dequantize()
    assert not any(isinstance(module, QuantLayer | ActivationQuantizer) for module in plain.modules())
    assert plain.state_dict().keys() == tiny_model("unet").state_dict().keys()
    assert all(torch.equal(plain.get_submodule(name).weight, weight) for name, weight in weights.items())
    assert "quantization_config" not in plain.config
    plain.save_pretrained(tmp_path / "plain")
    again = UNet2DModel.from_pretrained(tmp_path / "plain", torch_dtype=torch.float16)
    assert again.dtype == torch.float16
    assert torch.equal(predict(UNet2DModel.from_pretrained(tmp_path / "plain")), predict(plain))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_in.scale"), "missing 1 tensors of the model: conv_in.scale"),
        (lambda t: t.update({"spare": torch.zeros(1)}), "1 tensors not of the model: spare"),
        (lambda t: t.update({"conv_in.qweight": t["conv_in.qweight"][:, 1:].clone()}), "conv_in.qweight: got shape"),
        (lambda t: t.update({"conv_in.qweight": t["conv_in.qweight"].float()}), "got dtype torch.float32"),
        (lambda t: t["conv_in.scale"].zero_(), "conv_in.scale: got a scale that is zero"),
        (lambda t: t["conv_in.scale"].fill_(float("nan")), "conv_in.scale: got a scale that is zero"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    packed: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    rewrite(packed, change)
    with pytest.raises(ArtifactError, match=message):
        UNet2DModel.from_pretrained(packed)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_configs_that_do_not_fit_are_refused(packed: Path) -> None:
    good = (packed / "config.json").read_text()
    edit_config(packed, lambda c: c["layers"].update({"no.such.layer": c["layers"]["conv_in"]}))
    with pytest.raises(ArtifactError, match=r"does not fit UNet2DModel.*no"):
        UNet2DModel.from_pretrained(packed)
    (packed / "config.json").write_text(good)
    edit_config(packed, lambda c: c["layers"].update({"conv_norm_out": c["layers"]["conv_in"]}))
    with pytest.raises(ArtifactError, match=r"does not fit UNet2DModel: layer conv_norm_out: got GroupNorm"):
        UNet2DModel.from_pretrained(packed)
    (packed / "config.json").write_text(good)
    edit_config(packed, lambda c: c.update(version=7))
    with pytest.raises(ArtifactError, match="version: got 7, wanted 1 or 2"):
        UNet2DModel.from_pretrained(packed)


def test_quantizing_on_the_fly_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    tiny_model("unet").save_pretrained(tmp_path)
    config = QuantmillConfig(**quantization_config(ModelFormat({}, {})))
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=config)


def test_zero_points_and_formats_are_stored_once_and_small_and_version_1_still_loads(
    tiny_model: Make, quantize_model: Quantize, tmp_path: Path
) -> None:
    model = tiny_model("unet")
    model_format = quantize_model(model, granularity="per_group", group_size=8)
    want, state, folder = predict(model), model.state_dict(), pack(model, model_format, tmp_path / "packed")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS_FILE)
    assert len(config["quantization_config"]["formats"]) == len(set(model_format.layers.values()))
    full, packed = state["mid_block.resnets.0.conv1.zero_point"], tensors["mid_block.resnets.0.conv1.zero_point"]
    assert packed.shape == (len(full), -(-full.shape[1] // 2))
    assert torch.equal(predict(UNet2DModel.from_pretrained(folder)), want)
    config["quantization_config"] = {"quant_method": QUANT_METHOD, "version": 1, **model_format.to_json()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    assert torch.equal(predict(UNet2DModel.from_pretrained(folder)), want)


def test_multipliers_take_half_a_byte_in_version_3_and_are_checked(
    tiny_model: Make, quantize_model: Quantize, tmp_path: Path
) -> None:
    model, name = tiny_model("unet"), "mid_block.resnets.0.conv1"
    model_format = quantize_model(model, granularity="per_group", group_size=8, group_scale="integer")
    state, folder = model.state_dict(), pack(model, model_format, tmp_path / "packed")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS_FILE)
    assert config["quantization_config"]["version"] == 3
    full, packed = state[f"{name}.multiplier"], tensors[f"{name}.multiplier"]
    assert packed.shape == (len(full), -(-full.shape[1] // 2))
    assert (tensors[f"{name}.scale"].shape, tensors[f"{name}.scale"].dtype) == ((len(full), 1), torch.float32)
    assert torch.equal(UNet2DModel.from_pretrained(folder).state_dict()[f"{name}.multiplier"], full)
    UNet2DModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    tensors[f"{name}.multiplier"] = torch.full_like(packed, 255)  # 16 everywhere
    tensors[f"{name}.zero_point"] = torch.zeros_like(tensors[f"{name}.zero_point"])
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"packed tensors of {name}: multiplier: got up to 16, wanted \(code"):
        UNet2DModel.from_pretrained(folder)
