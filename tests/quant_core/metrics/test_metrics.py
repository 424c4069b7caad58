from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record_trajectories
from quant_core.diffusion.denoiser import Denoiser
from quant_core.inspect.inspection import inspect_model
from quant_core.metrics.cost import model_cost
from quant_core.metrics.frechet import (
    ResizedFeatures,
    efficientnet_lite0,
    frechet_distance,
    kernel_distance,
    sample_features,
)
from quant_core.metrics.images import difference, grid, to_rgb, to_uint8
from quant_core.metrics.psnr import IDENTICAL_DB, mean_with_ci, psnr_of_mean_error, psnr_per_sample
from quant_core.metrics.sqnr import error_power, sqnr_db
from quant_spec.enums import SampleSpace
from quant_spec.formats import ActivationSpec, AttentionSpec, LayerSpec, ModelFormat, WeightSpec
from quant_spec.sampler import Sampler

PIXELS, LATENTS = SampleSpace
Make = Callable[[str], nn.Module]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    quantized = torch.stack([torch.full((3, 4, 4), 0.02), torch.full((3, 4, 4), 0.2)])
    # peak 2, error 0.02 and 0.2: 40 and 20 dB
    torch.testing.assert_close(
        psnr_per_sample(reference, quantized, PIXELS), torch.tensor([40.0, 20.0], dtype=torch.float64)
    )


def test_psnr_clamps_images_and_not_latents() -> None:
    inside, outside = torch.ones(1, 3, 2, 2), torch.full((1, 3, 2, 2), 1.5)
    assert psnr_per_sample(inside, outside, PIXELS).tolist() == [IDENTICAL_DB]
    for channels in (1, 3, 4):
        latents = torch.zeros(1, channels, 2, 2)
        latents[0, 0, 0, 0] = 10.0  # the sample's range is its peak
        assert psnr_per_sample(latents, latents + 0.1, LATENTS).item() == pytest.approx(40.0, abs=1e-4)


def test_mean_with_ci_is_students() -> None:
    mean = mean_with_ci([1.0, 2.0, 3.0, 4.0])
    assert mean.value == 2.5
    assert mean.n == 4
    # t(0.975, 3) = 3.18245, standard error = 1.29099 / 2
    assert mean.ci95 == pytest.approx(3.18245 * 1.29099 / 2, abs=1e-4)
    assert mean_with_ci([7.0]).ci95 == 0.0


class Off(nn.Module):
    """A denoiser whose prediction is another's times a factor per step's timestep."""

    def __init__(self, inner: nn.Module, factors: dict[float, float]) -> None:
        super().__init__()
        self.inner, self.factors = inner, factors

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        factor = self.factors[float(timestep[0])]
        output: Tensor = self.inner(sample, timestep, class_labels).sample
        return output * factor


def test_sqnr_per_step_of_a_known_error(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model("unet")
    spec = RecordSpec(Sampler(scheduler="DDIMScheduler", num_inference_steps=4), predictions=True)
    trained = {"_class_name": "DDPMScheduler"}
    powers = []
    wrong = Off(model, {750.0: 1.1, 500.0: 0.99, 250.0: 1.0, 0.0: 0.0})
    for seeds in (range(3), range(3, 5)):
        path = tmp_path / str(seeds.start)
        record_trajectories(Denoiser(model, {}, trained, None), seeds, spec, path)
        found = CalibrationSet([path])
        powers.append(error_power(wrong, found, load_file(path)["prediction"], 2))
    together = sqnr_db(*torch.stack(powers).sum(0).tolist())
    assert together[:2] == pytest.approx([20.0, 40.0], abs=0.01)
    assert together[2] > 100
    assert together[3] == pytest.approx(0.0, abs=1e-6)


def test_sqnr_without_error_is_finite() -> None:
    assert sqnr_db([1.0, 1.0, 0.0], [0.0, 0.1, 1.0]) == [IDENTICAL_DB, pytest.approx(10.0), 0.0]


class Projection(nn.Module):
    """Features that are a fixed linear map of a few pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :6] @ noise(6, 6, seed=9)


@pytest.mark.parametrize("counts", [(500, 400), (500, 4), (5, 4)])
def test_frechet_distance_is_the_closed_form(counts: tuple[int, int]) -> None:
    """With samples of both, one or none of the sets more than features."""
    extractor = ResizedFeatures(Projection(), 4, 6, "projection")
    one = noise(counts[0], 3, 4, 4).clamp(-1, 1)
    two = (noise(counts[1], 3, 4, 4, seed=1) * 0.5 + 0.2).clamp(-1, 1)
    features = [extractor(images).double().numpy() for images in (one, two)]
    means = [f.mean(0) for f in features]
    covariances = [torch.from_numpy(f).T.cov().numpy() for f in features]
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    expected = ((means[0] - means[1]) ** 2).sum() + (covariances[0] + covariances[1]).trace() - 2 * root
    found = [sample_features(images, extractor) for images in (one, two)]
    assert frechet_distance(*found) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(found[0], found[0]) == pytest.approx(0.0, abs=1e-4)


def test_kernel_distance_is_unbiased_and_sees_another_distribution() -> None:
    draws = [(noise(40, 8, seed=2 * i), noise(40, 8, seed=2 * i + 1)) for i in range(200)]
    same = torch.tensor([kernel_distance(one, other) for one, other in draws])
    assert abs(float(same.mean())) < 3 * float(same.std()) / 200**0.5, "0 on average, although n is small"
    assert float(same.min()) < 0
    shifted = torch.tensor([kernel_distance(one, other + 0.5) for one, other in draws[:50]])
    assert float(shifted.mean()) > 5 * float(same.std())


def test_kernel_distance_never_compares_a_seed_with_itself() -> None:
    one = noise(40, 8)
    cross = kernel_distance(one, one)
    assert cross == pytest.approx(kernel_distance(torch.cat([one[20:], one[:20]]), torch.cat([one[20:], one[:20]])))
    assert cross != pytest.approx(0.0, abs=1e-6)


def test_the_mean_of_decibels_hides_a_tail_that_the_mean_error_shows() -> None:
    assert psnr_of_mean_error([40.0, 40.0]) == pytest.approx(40.0)
    assert psnr_of_mean_error([50.0, 20.0]) == pytest.approx(23.01, abs=0.01)


def test_resized_features_feed_the_size_that_the_network_wants() -> None:
    seen: list[tuple[int, ...]] = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(tuple(images.shape))
            return images.mean(dim=(2, 3))

    extractor = ResizedFeatures(Spy(), 16, 3, "spy")
    flat = torch.full((2, 3, 8, 8), 0.5)
    torch.testing.assert_close(extractor(flat), torch.full((2, 3), 0.5))
    assert seen == [(2, 3, 16, 16)]


def test_efficientnet_lite0_has_real_weights_and_ranks_noise() -> None:
    shipped = efficientnet_lite0()
    assert (shipped.name, shipped.pixels) == ("efficientnet-lite0-imagenet@224", 224)
    extractor = ResizedFeatures(shipped.network, 64, shipped.num_features, "small")  # a tenth of the time
    blobs = nn.functional.interpolate(noise(24, 3, 4, 4), (32, 32), mode="bicubic").clamp(-1, 1)
    features = extractor(blobs)
    assert features.shape == (24, 1280)
    # trained weights tell images apart; a random network's pooled features hardly differ between images
    spread = features.std(0).mean() / features.mean()
    assert float(spread) > 0.5
    slightly, badly = ((blobs + level * noise(24, 3, 32, 32, seed=2)).clamp(-1, 1) for level in (0.02, 0.3))
    distances = [frechet_distance(features, sample_features(images, extractor)) for images in (blobs, slightly, badly)]
    assert distances[0] == pytest.approx(0.0, abs=1e-3)
    assert distances[0] < distances[1] < distances[2]


def inspected(model: nn.Module) -> dict:
    return inspect_model(Denoiser(model, {}, None, None))


def test_cost_of_full_precision(tiny_model: Make) -> None:
    found = inspected(tiny_model("unet"))
    cost = model_cost(found, ModelFormat({}, {}))
    assert cost.bops == cost.bops_fp32 == round(found["forward_gmacs"] * 1e9) * 1024
    assert cost.weight_bits_mean == cost.act_bits_mean == 32


def test_cost_of_a_quantized_model_by_hand() -> None:
    found = {
        "layers": {"a": {"shape": [4, 2], "macs": 100}, "b": {"shape": [2, 4, 1, 1], "macs": 300}},
        "attentions": {"x": {"macs": 50}, "y": {"macs": 10}},
    }
    eight = ActivationSpec(8)
    model_format = ModelFormat(
        {"a": LayerSpec(WeightSpec(4), eight), "b": LayerSpec(WeightSpec(2))}, {"x": AttentionSpec(eight, 4)}
    )
    cost = model_cost(found, model_format)
    assert cost.weight_bits_mean == 3
    assert cost.act_bits_mean == (100 * 8 + 300 * 32) / 400
    assert cost.bops == 100 * 4 * 8 + 300 * 2 * 32 + 25 * 64 + 25 * 32 + 10 * 1024
    assert cost.bops_fp32 == 460 * 1024


def test_to_rgb_shows_anything() -> None:
    image = noise(2, 3, 4, 4)
    assert torch.equal(to_rgb(image, image, PIXELS), image.clamp(-1, 1))
    assert torch.equal(to_rgb(image[:, :1], image, PIXELS), image[:, :1].clamp(-1, 1).expand(-1, 3, -1, -1))
    for latents in (image * 9, noise(2, 4, 4, 4) * 9, noise(2, 2, 4, 4), noise(2, 16, 8), noise(2, 2, 7)):
        shown = to_rgb(latents, latents, LATENTS)
        assert shown.shape[:2] == (2, 3)
        assert float(shown.min()) == -1
        assert float(shown.max()) == 1
    assert to_rgb(noise(2, 16, 8), noise(2, 16, 8), LATENTS).shape == (2, 3, 4, 4)


def test_grid_places_every_image() -> None:
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    sheet = grid(images, columns=3, zoom=2)
    assert sheet.shape == (2 * 6 - 2, 3 * 6 - 2, 3)  # 4 pixels and a gap of 2
    assert [int(sheet[0, 6 * i, 0]) for i in range(3)] == [int(v) for v in to_uint8(images[:3])[:, 0, 0, 0]]
    assert int(sheet[6, 0, 0]) == int(to_uint8(images[3:4])[0, 0, 0, 0])
    assert int(sheet[9, 15, 0]) == 255  # the place of the sixth stays white
    assert int(sheet[5, 0, 0]) == 255  # the gap


def test_difference_is_grey_where_equal() -> None:
    one = torch.zeros(1, 3, 2, 2)
    assert to_uint8(difference(one, one)).unique().tolist() == [128]
    assert math.isclose(float(difference(one, one + 0.1)[0, 0, 0, 0]), 0.2, rel_tol=1e-6)


def test_cost_of_bits_that_differ_between_steps() -> None:
    found = {
        "layers": {"a": {"shape": [4, 2], "macs": 100}, "b": {"shape": [2, 4, 1, 1], "macs": 300}},
        "attentions": {},
    }
    layers = {
        "a": LayerSpec(WeightSpec(4), ActivationSpec(8, step_bits=(4, 8))),
        "b": LayerSpec(WeightSpec(2), ActivationSpec(8)),
    }
    cost = model_cost(found, ModelFormat(layers, {}, (2.0, 1.0)))
    assert cost.bops_per_step == (100 * 4 * 4 + 300 * 16, 100 * 4 * 8 + 300 * 16)
    assert cost.bops == sum(cost.bops_per_step) / 2
    assert cost.act_bits_mean == (100 * 6 + 300 * 8) / 400
    even = model_cost(found, ModelFormat(layers | {"a": LayerSpec(WeightSpec(4), ActivationSpec(6))}, {}))
    assert (even.bops, even.bops_per_step) == (cost.bops, ())


@pytest.mark.gpu
def test_features_are_computed_on_the_device_that_is_given() -> None:
    generator, seen = torch.Generator().manual_seed(0), set()
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(), nn.Linear(392, 16))
    network[0].register_forward_hook(lambda _, args, __: seen.add(args[0].device.type))
    extractor = ResizedFeatures(network, 16, 16, "conv").eval()
    sets = [torch.rand(40, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2)]
    here, there = (
        frechet_distance(*(sample_features(images, extractor, device=device) for images in sets))
        for device in ("cpu", "cuda")
    )
    assert seen == {"cpu", "cuda"}
    assert there == pytest.approx(here, rel=1e-3)
