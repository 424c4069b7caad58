from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant_core.methods.mpqdm.relation import log_relations, positions_last, relation_loss, smoothed


def features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_relations_by_hand() -> None:
    # Two positions at right angles and one along the first.
    feature = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    expected = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]).softmax(dim=-1)
    assert torch.allclose(log_relations(feature).exp()[0], expected)


def test_equal_features_have_no_loss_and_scales_do_not_matter() -> None:
    feature = features(0, 4, 5, 3, 3)
    assert relation_loss(feature, feature, 2).item() == pytest.approx(0, abs=1e-12)
    assert relation_loss(7 * feature, feature, 2).item() == pytest.approx(0, abs=1e-12)
    assert relation_loss(features(1, 4, 5, 3, 3), feature, 2).item() > 1e-3


def test_the_loss_is_the_divergence_of_averaged_features() -> None:
    own, target = features(0, 4, 5, 2, 3), features(1, 4, 5, 2, 3)
    expected = 0.0
    for run in range(2):
        p, q = (
            (lambda f: (f.T @ f).softmax(dim=1))(F.normalize(each[2 * run : 2 * run + 2].mean(0).flatten(1), dim=0))
            for each in (target, own)
        )
        expected += float((p * (p / q).log()).sum())
    assert relation_loss(own, target, 2).item() == pytest.approx(expected / 2)


def test_tokens_and_maps_are_the_same_positions() -> None:
    image = features(0, 2, 5, 2, 3)
    tokens = image.flatten(2).transpose(1, 2)
    assert torch.equal(positions_last(image), tokens)
    assert torch.equal(positions_last(tokens), tokens)
    assert smoothed(tokens, 2).shape == (1, 6, 5)


def test_drawn_positions_only_are_related() -> None:
    own, target = features(0, 2, 5, 6), features(1, 2, 5, 6)
    drawn = torch.tensor([4, 1])
    assert relation_loss(own, target, 1, drawn) == relation_loss(own[:, drawn], target[:, drawn], 1)


def test_the_gradient_reaches_every_step_and_is_the_true_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 1)).double()
    x, target = features(2, 4, 2, 4, 4).requires_grad_(), features(3, 4, 3, 4, 4)
    relation_loss(net(x), target, 2).backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=(1, 2, 3)) > 1e-6).all(), "both steps of each pair"
    for parameter in net.parameters():
        flat, grad = parameter.data.flatten(), parameter.grad
        assert grad is not None
        place = int(grad.abs().flatten().argmax())
        held, moved = flat[place].item(), []
        for shift in (1e-5, -1e-5):
            parameter.data.view(-1)[place] = held + shift
            moved.append(relation_loss(net(x), target, 2).item())
        parameter.data.view(-1)[place] = held
        # A bias of the last layer moves all positions alike; it has a gradient too, as cosines are not centred.
        assert grad.flatten()[place].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5, abs=1e-9)
        assert abs(grad.flatten()[place].item()) > 1e-6
