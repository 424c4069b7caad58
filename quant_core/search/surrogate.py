"""A surrogate: from the additive table to the measured error, corrected by the candidates measured so far.

The predicted log error of a candidate with parts d_i of damage, D their sum, is

    log e = a_v + b log D + sum_i (d_i / D) c_i

with an offset a_v for each variant, a slope b > 0, and corrections c: to first order, log sum_i d_i exp(c_i). A
correction is a sum of those of the part's width, of its layer, and of both together, so that what one candidate says of
a width or of a layer carries over to others. All are fitted at once by ridge regression towards the table as it is
(b = 1, c = 0); how strongly, is chosen by leaving candidates out one by one. The corrected damages d_i exp(c_i) add up
again, so that the knapsack is solved with them; drawn from the fit's posterior, they give other candidates that may be
the best (Thompson sampling).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quant_core.search.price import Part, Price

Floats = NDArray[np.float64]
Feature = tuple[str, ...]

#: Prior standard deviations: of corrections of a width, a layer, both; of the slope; of an offset between variants.
_WIDTH, _LAYER, _BOTH, _SLOPE, _VARIANT = 0.7, 0.3, 0.15, 0.15, 1.0
#: Noise of a measured log error that is tried, as standard deviation; the best is kept.
_NOISES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_CLIP = 2.5  # of a correction: a factor of 12
#: Draws are nearer to the mean than the posterior is wide: candidates are few, and most should be good.
_TEMPER = 0.5


@dataclass(frozen=True, slots=True)
class Observation:
    """A measured candidate: its variant, its price by the table, and the natural logarithm of its measured error."""

    variant: str
    price: Price
    log_error: float


@dataclass(frozen=True, slots=True)
class Surrogate:
    """What was learned.

    Attributes
    ----------
    n : int
        Candidates that it was learned from.
    offset, center : float
        Mean log ratio of error to damage; mean log damage, which the slope turns around.
    features : mapping
        Places of the features.
    weights, prior : array, shape (F,)
        Weights of the features, and the standard deviations that they were expected to have.
    gain, scaled : arrays, shape (F, n) and (n, F)
        How weights follow from residuals; features of the candidates in units of the prior.
    noise : float
        Standard deviation of a measured log error.
    left_out_rms : float or None
        Rms error of predicting each candidate from the others, natural logarithm; None below 3 candidates.
    """

    n: int = 0
    offset: float = 0.0
    center: float = 0.0
    features: Mapping[Feature, int] = field(default_factory=dict)
    weights: Floats = field(default_factory=lambda: np.zeros(0))
    prior: Floats = field(default_factory=lambda: np.zeros(0))
    gain: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    scaled: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    noise: float = 0.0
    left_out_rms: float | None = None

    def correction(self, part: Part, weights: Floats | None = None) -> float:
        """Return the factor on the damage of a part."""
        own = self.weights if weights is None else weights
        found = sum(own[self.features[name]] for name, _ in _features(part) if name in self.features)
        return math.exp(min(max(found, -_CLIP), _CLIP))

    def log_error(self, variant: str, price: Price) -> float:
        """Return the predicted natural logarithm of the error."""
        row = np.zeros(len(self.weights))
        for name, value in _row(variant, price, self.center).items():
            if name in self.features:
                row[self.features[name]] = value
        return self.offset + math.log(max(price.damage, 1e-300)) + float(row @ self.weights)

    def draw(self, generator: np.random.Generator) -> Floats:
        """Return weights drawn from the posterior: drawn from the prior, and moved as the candidates say (Matheron)."""
        drawn = self.prior * generator.standard_normal(len(self.prior))
        noise = self.noise * generator.standard_normal(self.n)
        seen = self.scaled @ (drawn / np.where(self.prior > 0, self.prior, 1)) + noise
        return self.weights + _TEMPER * (drawn - self.gain @ seen)


def fit(observed: Sequence[Observation]) -> Surrogate:
    """Learn from what was measured; without anything, errors are the table's damages."""
    if not observed:
        return Surrogate()
    logs = np.array([math.log(max(each.price.damage, 1e-300)) for each in observed])
    target = np.array([each.log_error for each in observed]) - logs
    center = float(logs.mean())
    rows = [_row(each.variant, each.price, center) for each in observed]
    names = sorted({name for row in rows for name in row})
    places = {name: place for place, name in enumerate(names)}
    matrix = np.zeros((len(rows), len(names)))
    for number, row in enumerate(rows):
        for name, value in row.items():
            matrix[number, places[name]] = value
    prior = np.array([_prior(name) for name in names])
    scaled = matrix * prior
    best: tuple[float, float] | None = None
    for noise in _NOISES:
        left_out = _left_out(scaled, target, noise)
        # Ridge's own bias towards the table grows with the noise, which the left-out error shows.
        if best is None or left_out < best[0]:
            best = left_out, noise
    assert best is not None
    rms, noise = best
    inner = np.linalg.inv(scaled @ scaled.T + noise**2 * np.eye(len(rows)))
    offset = float(inner.sum(axis=0) @ target / inner.sum())
    gain = prior[:, None] * (scaled.T @ inner)
    own = gain @ (target - offset)
    return Surrogate(len(rows), offset, center, places, own, prior, gain, scaled, noise, rms if len(rows) > 2 else None)


def _left_out(scaled: Floats, target: Floats, noise: float) -> float:
    """Return the rms error of each candidate's prediction from the others, with an offset that they share.

    For a Gaussian process with covariance K and an unknown mean, the error of leaving out i is [P y]_i / P_ii with
    P = K^-1 - K^-1 1 1' K^-1 / (1' K^-1 1).
    """
    inner = np.linalg.inv(scaled @ scaled.T + noise**2 * np.eye(len(target)))
    ones = inner.sum(axis=1)
    projected = inner - np.outer(ones, ones) / ones.sum()
    if len(target) < 2:
        return float(noise)
    return float(np.sqrt(np.mean((projected @ target / np.diag(projected)) ** 2)))


def _features(part: Part) -> list[tuple[Feature, float]]:
    """Return the corrections that apply to a part, with the standard deviation that each is expected to have."""
    return [
        ((part.kind, "width", part.key), _WIDTH),
        ((part.kind, "layer", part.layer), _LAYER),
        ((part.kind, "both", part.layer, part.key), _BOTH),
    ]


def _row(variant: str, price: Price, center: float) -> dict[Feature, float]:
    """Return the features of a candidate."""
    damage = max(price.damage, 1e-300)
    row: dict[Feature, float] = {("slope",): math.log(damage) - center, ("variant", variant): 1.0}
    for part in price.parts:
        for name, _ in _features(part):
            row[name] = row.get(name, 0.0) + part.damage / damage
    return row


def _prior(name: Feature) -> float:
    """Return the standard deviation that a feature's weight is expected to have."""
    if name[0] == "slope":
        return _SLOPE
    if name[0] == "variant":
        return _VARIANT
    return {"width": _WIDTH, "layer": _LAYER, "both": _BOTH}[name[1]]
