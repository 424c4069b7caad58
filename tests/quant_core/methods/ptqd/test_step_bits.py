from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from quant_core.methods.ptqd.step_bits import choose_step_bits, improve_jointly
from quant_core.methods.ptqd.step_effects import StepEffects, merge_effects
from quant_spec.enums import StepBitsMethod
from quant_spec.errors import QuantizationError
from quant_spec.passes.step_bits import StepBitsChoice

CHOICES = (4, 6, 8)


def effects(steps: int = 5, seed: int = 0, common: float = 1.0) -> StepEffects:
    """Make errors of final samples that fall with bits; `common` is how much of them all steps share."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(40, generator=generator)
    weights = common * torch.randn(steps, generator=generator)  # of either sign: errors add up or cancel
    vectors = torch.stack(
        [
            torch.stack([(torch.randn(40, generator=generator) + weight * shared) / 2**bits for bits in CHOICES])
            * (1 + torch.rand((), generator=generator) * 3)
            for weight in weights
        ]
    ).double()
    flat = vectors.flatten(0, 1)
    noise = torch.tensor([[4.0**-bits for bits in CHOICES]] * steps, dtype=torch.float64)
    return StepEffects(
        timesteps=tuple(float(t) for t in range(steps, 0, -1)),
        choices=CHOICES,
        gram=(flat @ flat.T).reshape(steps, 3, steps, 3),
        signal=torch.ones(steps, dtype=torch.float64),
        noise=noise,
        schedule_snr=torch.logspace(-2, 4, steps, dtype=torch.float64),
    )


def power(found: StepEffects, bits: tuple[int, ...], *, joint: bool) -> float:
    places = [CHOICES.index(each) for each in bits]
    pairs = itertools.product(enumerate(places), repeat=2)
    return sum(float(found.gram[a, i, b, j]) for (a, i), (b, j) in pairs if joint or a == b)


def best(found: StepEffects, budget: int, *, joint: bool) -> float:
    everything = itertools.product(CHOICES, repeat=len(found.timesteps))
    return min(power(found, bits, joint=joint) for bits in everything if sum(bits) <= budget)


@pytest.mark.parametrize("mean", [4.0, 5.0, 5.9, 6.0, 7.3, 8.0])
def test_effect_is_the_exact_optimum_within_the_mean(mean: float) -> None:
    for seed in range(5):
        found = effects(seed=seed)
        bits = choose_step_bits(found, StepBitsChoice(method=StepBitsMethod.EFFECT, target_mean=mean))
        assert sum(bits) <= mean * 5
        assert power(found, bits, joint=False) == pytest.approx(best(found, int(mean * 5), joint=False))


def test_joint_counts_that_errors_add_up() -> None:
    gains = []
    for seed in range(8):
        found = effects(seed=seed, common=2.0)
        config = StepBitsChoice(method=StepBitsMethod.EFFECT, target_mean=5.6)
        apart, together = (
            power(found, choose_step_bits(found, config.replaced(method=method)), joint=True)
            for method in (StepBitsMethod.EFFECT, StepBitsMethod.JOINT)
        )
        assert together <= apart * (1 + 1e-9)
        assert together <= 1.05 * best(found, 28, joint=True)
        gains.append(together < 0.999 * apart)
    assert any(gains)


@pytest.mark.parametrize("method", [StepBitsMethod.EFFECT, StepBitsMethod.JOINT])
def test_the_last_step_keeps_its_least_bits(method: StepBitsMethod) -> None:
    found = effects(seed=3)
    found = replace(found, gram=found.gram.clone())
    found.gram[-1] *= 1e-6
    found.gram[:, :, -1] *= 1e-6
    config = StepBitsChoice(method=method, target_mean=5.6)
    free, kept = (choose_step_bits(found, config.replaced(least_last=least)) for least in (None, 6))
    assert free[-1] == 4
    assert kept[-1] == 6
    assert sum(kept) <= 28
    everything = [bits for bits in itertools.product(CHOICES, repeat=5) if sum(bits) <= 28 and bits[-1] >= 6]
    joint = method is StepBitsMethod.JOINT
    least = min(power(found, bits, joint=joint) for bits in everything)
    assert power(found, kept, joint=joint) <= least * (1.05 if joint else 1 + 1e-9)
    with pytest.raises(QuantizationError, match=r"got 8, wanted at most 8.*what a mean of 4 leaves"):
        choose_step_bits(found, config.replaced(target_mean=4.0, least_last=8))


def test_joint_stays_where_nothing_is_better() -> None:
    gram = np.zeros((2, 2, 2, 2))
    gram[range(2), :, range(2), :] = np.diag([2.0, 1.0])
    assert improve_jointly(gram, (4, 8), 16, [1, 1]) == [1, 1]
    assert improve_jointly(gram, (4, 8), 16, [0, 0]) == [1, 1]
    assert improve_jointly(gram, (4, 8), 12, [0, 0]) in ([0, 1], [1, 0])


@pytest.mark.parametrize("method", [StepBitsMethod.EFFECT, StepBitsMethod.JOINT])
def test_a_single_step_gets_what_fits(method: StepBitsMethod) -> None:
    config = StepBitsChoice(method=method, target_mean=6.5)
    assert choose_step_bits(effects(1), config) == (6,)
    assert choose_step_bits(effects(1), config.replaced(target_mean=4.0)) == (4,)


def test_the_orders() -> None:
    found = effects(4)
    early = [
        choose_step_bits(found, StepBitsChoice(method=StepBitsMethod.EARLY_LOW, target_mean=mean))
        for mean in (4.0, 5.5, 6.0, 8.0)
    ]
    assert early == [(4, 4, 4, 4), (4, 4, 6, 8), (4, 4, 8, 8), (8, 8, 8, 8)]
    assert choose_step_bits(found, StepBitsChoice(method=StepBitsMethod.LATE_LOW, target_mean=5.5)) == (8, 6, 4, 4)


def test_snr_takes_the_least_bits_that_are_clean_enough() -> None:
    found = effects(4)  # SNR of the schedule 0.01, 1, 100, 10000; of 4, 6, 8 bits 256, 4096, 65536
    by = StepBitsMethod.SNR
    assert choose_step_bits(found, StepBitsChoice(method=by, threshold=1.0)) == (4, 4, 4, 8)
    assert choose_step_bits(found, StepBitsChoice(method=by, threshold=10.0)) == (4, 4, 6, 8)
    assert choose_step_bits(found, StepBitsChoice(method=by, threshold=1e9)) == (8, 8, 8, 8)


@pytest.mark.parametrize("mean", [4.0, 4.5, 5.0, 6.0, 7.0, 8.0])
def test_snr_is_solved_for_a_mean(mean: float) -> None:
    found = effects(4)
    bits = choose_step_bits(found, StepBitsChoice(method=StepBitsMethod.SNR, target_mean=mean))
    assert sum(bits) <= 4 * mean
    assert list(bits) == sorted(bits)
    solved = [
        choose_step_bits(found, StepBitsChoice(method=StepBitsMethod.SNR, threshold=2.0**c)) for c in range(-20, 40)
    ]
    assert sum(bits) == max(sum(each) for each in solved if sum(each) <= 4 * mean)


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"got 3.5, wanted at least 4"):
        choose_step_bits(effects(), StepBitsChoice(method=StepBitsMethod.EFFECT, target_mean=3.5))


def test_effects_add_up_and_survive_bytes() -> None:
    first, second = effects(seed=1), effects(seed=2)
    merged = merge_effects([first, second])
    assert torch.equal(merged.gram, first.gram + second.gram)
    again = StepEffects.from_bytes(merged.to_bytes())
    assert torch.equal(again.gram, merged.gram)
    assert (again.timesteps, again.choices) == (merged.timesteps, merged.choices)
    with pytest.raises(QuantizationError, match="different trajectories"):
        merge_effects([first, replace(second, choices=(4, 6, 7))])
    with pytest.raises(QuantizationError, match="got no shards"):
        merge_effects([])
