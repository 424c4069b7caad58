"""What is remembered of the channels of a layer's input, at each trajectory step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class ChannelStats:
    """Extremes and second moments of a layer's input channels, and a seeded draw of positions.

    Attributes
    ----------
    steps, positions : int
        Trajectory steps; positions kept of each sample, at most (0 keeps none).
    low, high : Tensor, shape (S, C), dtype float32
    fit_low, fit_high : Tensor, shape (S, C), dtype float32
        Extremes over the rows that scales are fitted to; infinite if there are none.
    square : Tensor, shape (S, C), dtype float32
        Sum of squares.
    count : Tensor, shape (S,), dtype float32
        Values of one channel that were seen.
    drawn : list of S lists of Tensor, shape (B, positions, C), dtype float32
    """

    steps: int
    channels: int
    positions: int = 0
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)
    fit_low: Tensor = field(init=False)
    fit_high: Tensor = field(init=False)
    square: Tensor = field(init=False)
    count: Tensor = field(init=False)
    drawn: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.steps, self.channels)
        self.low, self.high = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
        self.fit_low, self.fit_high = self.low.clone(), self.high.clone()
        self.square, self.count = torch.zeros(shape), torch.zeros(self.steps)
        self.drawn = [[] for _ in range(self.steps)]

    def update(
        self,
        step: int,
        x: Tensor,
        generator: torch.Generator,
        fit_rows: int | None = None,
        drawn_rows: int | None = None,
    ) -> None:
        """Add a batch of one step, shape (B, ..., C).

        The first `fit_rows` of the batch (all if None) are rows that scales are fitted to. Positions are drawn and kept
        of the first `drawn_rows` (all if None).
        """
        tokens = x.detach().reshape(len(x), -1, x.shape[-1])
        rows = tokens.flatten(0, 1).float().cpu()
        self.low[step] = torch.minimum(self.low[step], rows.amin(0))
        self.high[step] = torch.maximum(self.high[step], rows.amax(0))
        first = rows if fit_rows is None else tokens[:fit_rows].flatten(0, 1).float().cpu()
        if len(first):
            self.fit_low[step] = torch.minimum(self.fit_low[step], first.amin(0))
            self.fit_high[step] = torch.maximum(self.fit_high[step], first.amax(0))
        self.square[step] += rows.square().sum(0)
        self.count[step] += len(rows)
        tokens = tokens[:drawn_rows]
        if self.positions and len(tokens):
            kept = torch.arange(tokens.shape[1])
            if len(kept) > self.positions:
                kept = torch.randperm(len(kept), generator=generator)[: self.positions]
            self.drawn[step].append(tokens[:, kept.to(tokens.device)].float().cpu())

    def repeat(self, alike: Sequence[int]) -> None:
        """Let each step have what was seen at the one that it is like."""
        for name in ("low", "high", "fit_low", "fit_high", "square", "count"):
            setattr(self, name, getattr(self, name)[list(alike)])
        self.drawn = [self.drawn[step] for step in alike]

    def second_moment(self) -> Tensor:
        """Return E[x_k^2] at each step, shape (S, C)."""
        return self.square / self.count.clamp(min=1)[:, None]

    def samples(self, step: int) -> Tensor:
        """Return the drawn positions of a step, shape (samples, positions, C)."""
        return torch.cat(self.drawn[step])
