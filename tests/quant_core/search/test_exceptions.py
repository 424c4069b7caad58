"""What stays in full precision: the least damage within two limits."""

from __future__ import annotations

import itertools

import pytest

from quant_core.fit.trials import Damages
from quant_core.search.exceptions import Kept, Limits, Part, choose_exceptions, left_damage

PARTS = [Part("conv", 100, 50), Part("ff", 40, 30), Part("out", 10, 4), Part("attention", 20, None)]
DAMAGES = Damages(
    inputs={"conv": 5.0, "ff": 3.0, "out": 2.0},
    products={"attention": 4.0},
    weights={"conv": 1.0, "ff": 0.5, "out": 3.0},
)


@pytest.mark.parametrize("macs", [0, 10, 30, 70, 130, 170])
@pytest.mark.parametrize("added", [0, 4, 34, 84])
def test_no_other_choice_within_the_limits_leaves_less(macs: int, added: int) -> None:
    chosen = choose_exceptions(PARTS, DAMAGES, Limits(macs, added))
    best = float("inf")
    for kept in itertools.product(Kept, repeat=len(PARTS)):
        if kept[3] is Kept.ALL:
            continue
        used = sum(part.macs for part, what in zip(PARTS, kept, strict=True) if what is not Kept.NOTHING)
        more = sum(part.added_bytes or 0 for part, what in zip(PARTS, kept, strict=True) if what is Kept.ALL)
        names = {part.name: what for part, what in zip(PARTS, kept, strict=True)}
        if used <= macs and more <= added:
            best = min(best, left_damage(PARTS, DAMAGES, names))
    assert left_damage(PARTS, DAMAGES, chosen) == pytest.approx(best)
    assert Kept.NOTHING not in chosen.values()


def test_weights_that_were_not_tried_stay_quantized() -> None:
    damages = Damages(inputs=DAMAGES.inputs, products=DAMAGES.products)
    chosen = choose_exceptions(PARTS, damages, Limits(170, 1000))
    assert chosen == dict.fromkeys(("conv", "ff", "out", "attention"), Kept.OPERANDS)


def test_an_input_that_was_not_quantized_is_no_choice() -> None:
    damages = Damages(weights={"conv": 1.0})
    assert choose_exceptions(PARTS[:1], damages, Limits(1000, 0)) == {}
    assert choose_exceptions(PARTS[:1], damages, Limits(1000, 50)) == {"conv": Kept.ALL}
