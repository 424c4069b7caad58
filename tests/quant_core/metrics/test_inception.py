from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_core.errors import DenoiserError
from quant_core.metrics.frechet import ResizedFeatures, inception_v3
from quant_core.metrics.inception import InceptionV3

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@cache
def weights(classes: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return InceptionV3(is_fid=True).state_dict() | {"fc.weight": torch.zeros(classes, 2048)}


def test_inception_has_the_published_size() -> None:
    assert sum(p.numel() for p in InceptionV3(is_fid=False).parameters()) == 21_785_568


@pytest.fixture(scope="module")
def extractors(tmp_path_factory: pytest.TempPathFactory) -> list[ResizedFeatures]:
    """Both networks, one from safetensors and one from torch's own format."""
    folder = tmp_path_factory.mktemp("weights")  # a blob of a store has no suffix
    save_file(weights(1008), folder / "fid")
    torch.save(weights(1000), folder / "torchvision")
    return [inception_v3(folder / name) for name in ("fid", "torchvision")]


def test_inception_v3_from_a_file(extractors: list[ResizedFeatures]) -> None:
    assert [each.name for each in extractors] == ["inception-v3-fid@299", "inception-v3-torchvision@299"]
    assert {each.num_features for each in extractors} == {2048}


def test_the_two_networks_pool_differently(extractors: list[ResizedFeatures]) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = [extractor(image) for extractor in extractors]
    assert {tuple(each.shape) for each in features} == {(1, 2048)}
    assert not torch.allclose(features[0], features[1])


class Scripted(nn.Module):
    """A network that wants bytes, as StyleGAN's exported Inception does."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.mean(dim=(2, 3)) if return_features else images.mean(dim=(1, 2, 3))


def test_inception_v3_from_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Scripted()).save(path)
    extractor = inception_v3(path)
    assert extractor.num_features == 3
    torch.testing.assert_close(extractor(torch.ones(1, 3, 8, 8)), torch.full((1, 3), 255.0))


def test_inception_v3_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DenoiserError, match="got no usable weights"):
        inception_v3(path)
    save_file({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(DenoiserError, match="wanted InceptionV3"):
        inception_v3(path)
    tensors = weights(1008)
    save_file(tensors | {"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, path)
    with pytest.raises(DenoiserError, match="got no usable weights"):
        inception_v3(path)


def test_inception_v3_never_unpickles_code(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    torch.save(Scripted(), path)
    with pytest.raises(DenoiserError, match="got no usable weights"):
        inception_v3(path)
