"""LPIPS by weights from a file: the same figures as torchmetrics gives, whose networks are torchvision's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchmetrics.functional.image import lpips as published

from quant_core.errors import DenoiserError
from quant_core.metrics.lpips import Lpips, lpips_per_sample
from tests.backbones import BACKBONES, save_weights, weights_of


def images(count: int, side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    one = torch.rand(count, 3, side, side + 3, generator=generator) * 2 - 1
    return one, (one + 0.3 * torch.randn(one.shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize(("name", "side"), [("alex", 31), ("alex", 64), ("vgg", 16)])
def test_it_is_what_torchmetrics_has_of_the_same_weights(
    name: str, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {key.removeprefix("features."): value for key, value in weights_of(name).items() if "features" in key}

    def features(network: str, pretrained: bool) -> nn.Sequential:
        built = BACKBONES[name]()
        built.load_state_dict(weights)
        return built

    monkeypatch.setattr(published, "_get_tv_model_features", features)  # in place of torchvision and its download
    one, other = images(3, side)
    wanted = learned_perceptual_image_patch_similarity(one, other, net_type=name, reduction="none")
    lpips = Lpips(save_weights(tmp_path / "weights.pth", name))
    assert lpips.network == name
    torch.testing.assert_close(torch.tensor(lpips_per_sample(one, other, lpips)), wanted, rtol=1e-5, atol=1e-7)
    assert min(wanted) > 0
    assert lpips_per_sample(one, one, lpips) == [0, 0, 0]


def test_any_format_of_the_file_will_do(tmp_path: Path) -> None:
    weights = weights_of("alex")
    one, other = images(1, 32)
    wanted = lpips_per_sample(one, other, Lpips(save_weights(tmp_path / "zip.pth")))
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # as vgg16-397923af.pth is
    save_file({key: value for key, value in weights.items() if "features" in key}, tmp_path / "alexnet.safetensors")
    for name in ("old.pth", "alexnet.safetensors"):
        assert lpips_per_sample(one, other, Lpips(tmp_path / name)) == wanted


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"no weights")
    with pytest.raises(
        DenoiserError, match=r"evaluation.lpips: got a file that does not load \(.*\), wanted the state"
    ):
        Lpips(file)
    for content, got in (
        ({}, "no tensor"),
        ({"fc": torch.zeros(2)}, r"fc \(2,\) and 0 more"),
        ([torch.zeros(2)], "a file that does not load .got list"),
    ):
        torch.save(content, file)
        with pytest.raises(DenoiserError, match=rf"evaluation.lpips: got {got}.*wanted the state dict of torchvision"):
            Lpips(file)


def test_images_that_are_too_small_are_refused(tmp_path: Path) -> None:
    lpips = Lpips(save_weights(tmp_path / "weights.pth"))
    with pytest.raises(DenoiserError, match="got images with a side of 30 pixels, wanted at least 31 with alex"):
        lpips_per_sample(*images(1, 30), lpips)
