"""Which product of a small layer runs, as it was timed. What a clock says decides nothing here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import cpu_measure, native
from kernels.activations import QuantizedActivation
from kernels.conv import ConvGeometry
from kernels.cpu import CONV_TOLERANCE, cpu_conv2d, cpu_linear
from kernels.cpu_measure import TOTAL_LIMIT, Timing, Timings, chosen_work, measured, shape_key, why_unpack
from kernels.cpu_weight import ANY_WORK, SMALL_WORK, CpuWeight, pack_cpu_weight
from kernels.epilogue import Epilogue
from tests.kernels.example_layers import random_layer

pytestmark = pytest.mark.skipif(not native.product_level(), reason="no AVX2, or nothing is compiled")


def weight(geometry: ConvGeometry | None = None) -> CpuWeight:
    """Of 6 bits, which no CPU's products of oneDNN saturate with."""
    taps = 1 if geometry is None else geometry.taps
    packed = pack_cpu_weight([random_layer(50, 40, bits=6, taps=taps, symmetric=True).packed], geometry)
    assert packed.packed is not None
    return packed


def timings(*pairs: tuple[int, float, float | None]) -> tuple[Timing, ...]:
    """Of work, our own seconds and oneDNN's."""
    return tuple(Timing(64, work, own, other, 1.0) for work, own, other in pairs)


@pytest.mark.parametrize(
    ("found", "limit"),
    [
        (timings((10, 1.0, 2.0), (40, 4.0, 8.0)), 100),  # nothing against the rule
        (timings((10, 1.0, 0.9), (40, 4.0, 3.6)), 100),  # not clear
        (timings((10, 1.0, 0.5), (40, 4.0, 2.0)), 9),
        (timings((10, 1.0, 2.0), (40, 4.0, 2.0)), 39),
        (timings((10, 1.0, 2.0), (200, 4.0, 8.0)), 200),  # beyond the rule
        (timings((10, 1.0, 2.0), (200, 4.0, 4.2)), 100),
        (timings((10, 1.0, 2.0), (200, 4.0, 2.0), (800, 16.0, 8.0)), 100),
        (timings((10, 1.0, None), (40, 4.0, None)), 100),
    ],
)
def test_the_rule_is_left_where_the_other_is_clearly_faster(found: tuple[Timing, ...], limit: int) -> None:
    assert chosen_work(found, 100) == limit


@pytest.mark.parametrize("geometry", [None, ConvGeometry((3, 3), padding=(1, 1)), ConvGeometry((3, 3), (2, 2))])
def test_a_shape_is_timed_once_and_the_listing_says_what_was_found(geometry: ConvGeometry | None) -> None:
    cache, layer = Timings(), weight(geometry)
    chosen, said = measured(layer, cache)
    (found,) = cache.known.values()
    assert 1 <= len(found) <= len(cpu_measure.SIDES)
    assert all(timing.own > 0 and timing.other and timing.floats > 0 for timing in found)
    assert said.startswith("measured ")
    assert f"of float32 at {found[0].rows} rows" in said
    assert chosen.small_work == chosen_work(found, SMALL_WORK)
    spent = cache.spent
    assert measured(layer, cache)[1] == said
    assert (len(cache.known), cache.spent) == (1, spent)


def test_a_weight_is_unpacked_where_integers_are_slower_than_floats_at_all_sizes() -> None:
    layer = weight()

    def why(*pairs: tuple[float, float | None, float | None]) -> str:
        """Of seconds of the products, and of floats on what codes stand for; floats alone take 1.0."""
        found = tuple(Timing(64 * 4**i, i, own, other, 1.0, unpacked) for i, (own, other, unpacked) in enumerate(pairs))
        return why_unpack(layer, Timings({shape_key(layer): found}))

    slow = (1.3, 1.5, 1.1)
    assert why(slow, (1.25, None, 1.1)) == "integers measured 1.30 of float32 at 64 rows, 1.25 of float32 at 256 rows"
    for faster in ((1.05, 1.5, None), (1.5, 1.05, None), (1.3, 1.5, 1.29)):
        assert why(faster) == ""
        assert why(slow, faster) == ""
    assert why() == ""
    assert why_unpack(layer, Timings()) == ""


def test_nothing_is_timed_for_those_who_want_the_same_twice_or_when_time_is_up() -> None:
    layer = weight()
    try:
        torch.use_deterministic_algorithms(True)
        assert measured(layer, cache := Timings()) == (layer, "")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not cache.known
    assert measured(layer, Timings(spent=TOTAL_LIMIT)) == (layer, "")
    alone = replace(layer, small=None)
    assert measured(alone, Timings()) == (alone, "")
    # A kernel that is taller than the images.
    huge = weight(ConvGeometry((65, 3)))
    assert measured(huge, Timings())[1] == ""


def test_a_weight_without_another_product_keeps_its_own() -> None:
    only = replace(weight(), packed=None, small_work=ANY_WORK)
    chosen, said = measured(only, Timings())
    assert chosen.small_work == ANY_WORK
    assert said.startswith("measured ")
    assert "one call" not in said


@pytest.mark.parametrize("geometry", [None, ConvGeometry((3, 3), padding=(1, 1))])
def test_what_is_chosen_between_differs_by_rounding_only(geometry: ConvGeometry | None) -> None:
    layer, g = weight(geometry), torch.Generator().manual_seed(0)
    shape = (70, 40) if geometry is None else (2, 7, 5, 40)
    codes = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    x = QuantizedActivation(codes, torch.tensor([0.037]), torch.tensor([131], dtype=torch.int32), False)
    multiply = cpu_linear if geometry is None else cpu_conv2d
    ours, other = (multiply(x, replace(layer, small_work=work), Epilogue()) for work in (ANY_WORK, 0))
    assert layer.small is not None
    magnitude = layer.small.values.float().abs().sum((1, 2, 4)).flatten()[:50] * layer.scale * 255 * 0.037
    assert bool(((ours - other).abs() <= CONV_TOLERANCE * magnitude).all())
