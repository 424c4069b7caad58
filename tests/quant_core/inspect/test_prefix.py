from __future__ import annotations

import torch
from torch import Tensor, nn

from quant_core.inspect.prefix import Prefix


class Net(nn.Module):
    """Two units with a skip connection around the second, a layer outside of them, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.second = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.last = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden + self.second(hidden))


LAYERS = {"first.0": "first", "first.2": "first", "second.0": "second", "second.2": "second", "last": "last"}
UNITS = ["first", "second", "last"]


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().requires_grad_(False), torch.randn(3, 4)


def test_a_changed_layer_gives_what_a_whole_forward_gives() -> None:
    model, x = net()
    prefix = Prefix(model, UNITS, LAYERS | {"unused": "unused"})
    given = prefix.record(lambda: model(x))
    assert torch.equal(given, model(x))
    for name in [*LAYERS, "unused"]:
        weight = model.get_parameter(f"{name}.weight")
        weight.data = weight.data * 2
        with prefix.before(name):
            found = prefix_forward = model(x)
        assert torch.equal(prefix_forward, model(x))
        assert torch.equal(found, given) == (name == "unused")
        weight.data = weight.data / 2
    assert torch.equal(model(x), given)


def test_nothing_before_it_is_computed_again() -> None:
    model, x = net()
    prefix = Prefix(model, UNITS, LAYERS)
    given = prefix.record(lambda: model(x))
    for name in ("first.0", "first.2", "second.0"):
        model.get_parameter(f"{name}.weight").data.fill_(torch.nan)
    with prefix.before("second.2"):
        assert torch.equal(model(x), given)
    with prefix.before("second.0"):
        assert model(x).isnan().all()


def test_what_is_written_over_later_is_computed_again() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            hidden += 1
            return self.last(self.second(hidden))

    torch.manual_seed(0)
    model, x = InPlace().requires_grad_(False), torch.randn(3, 4)
    prefix = Prefix(model, UNITS, LAYERS)
    given = prefix.record(lambda: model(x))
    for _ in range(2):
        with prefix.before("last"):
            assert torch.equal(model(x), given)
