"""Choose the activation bits of each trajectory step: by PTQD's rule (Sec. 3.4), and by rules that were found better.

Of the two fixed orders, the paper's has low bits at the early steps, the noisiest. Every rule but that by a threshold
keeps the mean bits at or below `target_mean`.
"""

from __future__ import annotations

import math

import numpy as np

from quant_core.methods.ptqd.step_effects import StepEffects
from quant_core.search.knapsack import Choice, choose
from quant_spec.enums import StepBitsMethod
from quant_spec.errors import QuantizationError
from quant_spec.passes.step_bits import StepBitsChoice


def choose_step_bits(effects: StepEffects, config: StepBitsChoice) -> tuple[int, ...]:
    """Return the bits of each step.

    Raises
    ------
    QuantizationError
        If the target mean is below the least choice, or leaves too few for the last step.
    """
    choices, steps = effects.choices, len(effects.timesteps)
    if config.method is StepBitsMethod.SNR and config.threshold is not None:
        return _by_snr(effects, config.threshold)
    budget = math.floor(config.target_mean * steps + 1e-9)
    if budget < min(choices) * steps:
        raise QuantizationError(
            f"step_bits.target_mean: got {config.target_mean:g}, wanted at least {min(choices)}, the least choice"
        )
    if config.method in (StepBitsMethod.EARLY_LOW, StepBitsMethod.LATE_LOW):
        late_high = _ordered(choices, steps, budget)
        return late_high if config.method is StepBitsMethod.EARLY_LOW else late_high[::-1]
    if config.method is StepBitsMethod.SNR:
        return _by_snr_within(effects, budget)
    gram = effects.gram.numpy().copy()
    enough = [bits for bits in choices if bits >= (config.least_last or 0)]
    if not enough or budget < min(choices) * (steps - 1) + min(enough):
        raise QuantizationError(
            f"step_bits.least_last: got {config.least_last}, wanted at most {max(choices)}, the greatest choice, and "
            f"what a mean of {config.target_mean:g} leaves"
        )
    low = [place for place, bits in enumerate(choices) if bits not in enough]
    gram[steps - 1, low, steps - 1, low] = np.inf
    places = np.arange(steps)
    powers = gram[places, :, places, :][:, range(len(choices)), range(len(choices))]
    allowed = [[place for place in range(len(choices)) if np.isfinite(row[place])] for row in powers]
    items = [
        [Choice(float(row[place]), choices[place]) for place in own] for row, own in zip(powers, allowed, strict=True)
    ]
    start = [own[place] for own, place in zip(allowed, choose(items, budget), strict=True)]
    found = start if config.method is StepBitsMethod.EFFECT else improve_jointly(gram, choices, budget, start)
    return tuple(choices[place] for place in found)


def _by_snr(effects: StepEffects, threshold: float) -> tuple[int, ...]:
    """Return the least bits with SNR_Q >= c SNR_F at each step, else the greatest (Sec. 3.4)."""
    order = sorted(range(len(effects.choices)), key=lambda place: effects.choices[place])
    snr = (effects.signal[:, None] / effects.noise.clamp(min=1e-300)).tolist()
    wanted = (threshold * effects.schedule_snr).tolist()
    rows = zip(snr, wanted, strict=True)
    picked = [next((place for place in order if row[place] >= least), order[-1]) for row, least in rows]
    return tuple(effects.choices[place] for place in picked)


def _by_snr_within(effects: StepEffects, budget: int) -> tuple[int, ...]:
    """Return the allocation by SNR with the greatest threshold that a budget of bits allows."""
    ratios = effects.signal[:, None] / effects.noise.clamp(min=1e-300) / effects.schedule_snr[:, None]
    # Just at a ratio a step still has these bits; above the greatest, all steps have the greatest bits.
    thresholds = [*sorted(ratios.flatten().tolist(), reverse=True), 0.0]
    candidates = (_by_snr(effects, threshold) for threshold in (math.inf, *thresholds))
    return next(bits for bits in candidates if sum(bits) <= budget)


def _ordered(choices: tuple[int, ...], steps: int, budget: int) -> tuple[int, ...]:
    """Return the least bits first and the greatest last, with one step in between if that fills the budget better."""
    least, greatest = min(choices), max(choices)
    bits = [least] * steps
    left = budget - least * steps
    for step in reversed(range(steps)):
        bits[step] = max(choice for choice in choices if choice - least <= left)
        left -= bits[step] - least
        if bits[step] < greatest:
            break
    return tuple(bits)


def improve_jointly(gram: np.ndarray, choices: tuple[int, ...], budget: int, start: list[int]) -> list[int]:
    """Change one or two steps at a time as long as the power of the summed error falls, bits within the budget.

    Parameters
    ----------
    gram : array, shape (S, K, S, K)
        Inner products of the errors of each step at each choice.
    """
    steps, kinds = gram.shape[:2]
    flat = gram.reshape(steps * kinds, steps * kinds)
    own = flat.diagonal()
    found = list(start)
    for _ in range(10 * steps):
        chosen = np.array([step * kinds + place for step, place in enumerate(found)])
        field = flat[:, chosen].sum(axis=1)
        old = np.repeat(chosen, kinds)
        # of replacing one step's choice: |e + d|^2 - |e|^2 with d = new - old
        change = own - 2 * flat[np.arange(len(own)), old] + own[old] + 2 * (field - field[old])
        cross = flat - flat[:, old] - flat[old, :] + flat[np.ix_(old, old)]
        both = change[:, None] + change[None, :] + 2 * cross
        bits = np.tile(np.array(choices), steps) - np.repeat(np.array([choices[place] for place in found]), kinds)
        room = budget - sum(choices[place] for place in found)
        same_step = np.kron(np.eye(steps, dtype=bool), np.ones((kinds, kinds), dtype=bool))
        both[same_step | (bits[:, None] + bits[None, :] > room)] = np.inf
        first, second = np.unravel_index(int(np.argmin(both)), both.shape)
        if not both[first, second] < -1e-9 * float(field[chosen].sum()):
            break
        found[first // kinds], found[second // kinds] = int(first % kinds), int(second % kinds)
    return found
