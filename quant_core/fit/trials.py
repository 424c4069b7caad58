"""What quantizing one part of a model does to its final samples: a layer's input, an attention's products, a weight.

Each trial runs the sampler from a few seeds with that part alone quantized, at all steps, and compares the samples with
those of full precision. So it has in it what no error of a prediction says: how far errors of neighbouring steps add
up, and what guidance makes of the errors of its two halves (errors that both have are not amplified, others are, by its
scale and more). Of parts whose errors are unlike each other, the powers add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant_core.diffusion.trajectories import Trajectories
from quant_core.fit.exchange import Exchange
from quant_core.fit.unit_state import UnitState, merge_formats
from quant_core.nn.steps import StepClock, attach_clock
from quant_spec.documents import read_json
from quant_spec.keys import canonical_json
from quant_spec.numbers import significant


@dataclass(frozen=True, slots=True)
class Damages:
    """Mean square error of the final samples with one part quantized, by the names of layers or attentions."""

    inputs: Mapping[str, float] = field(default_factory=dict)
    products: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Serialise."""
        told = {name: dict(getattr(self, name)) for name in ("inputs", "products", "weights")}
        return canonical_json(told).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Damages:
        """Read what `to_bytes` wrote."""
        found: dict[str, Any] = read_json(data, "damages")
        return cls(found["inputs"], found["products"], found["weights"])


def merge_damages(parts: Sequence[Damages]) -> Damages:
    """Unite the damages of several groups of units."""
    kinds = ("inputs", "products", "weights")
    return Damages(**{kind: {n: x for part in parts for n, x in getattr(part, kind).items()} for kind in kinds})


@torch.no_grad()
def try_parts(
    trajectories: Trajectories, states: Sequence[UnitState], seeds: Sequence[int], *, batch_size: int, weights: bool
) -> Damages:
    """Quantize each part of some units alone.

    Parameters
    ----------
    trajectories : Trajectories
        In full precision, on its device; its model is left with a clock.
    states : sequence of UnitState
        The units, as they would be packed.
    seeds : sequence of int
        Whose samples are compared.
    batch_size : int
        Seeds per denoiser call.
    weights : bool
        Whether weights are tried too.
    """
    model = trajectories.model
    form = merge_formats(list(states))
    clock = StepClock(form.timesteps, form.unknown_timestep)
    expected = _draw(trajectories, seeds, batch_size)
    exchange = Exchange(model, clock)
    inputs: dict[str, float] = {}
    products: dict[str, float] = {}
    tried: dict[str, float] = {}

    def damage() -> float:
        error = _draw(trajectories, seeds, batch_size).double() - expected.double()
        return significant(float(error.square().mean()))

    attach_clock(model, clock)
    for state in states:
        for name, spec in state.formats.layers.items():
            if spec.activation is not None:
                with exchange.quantized_input(state, name):
                    inputs[name] = damage()
            if weights:
                with exchange.holding(name, exchange.rounded(state, name)):
                    tried[name] = damage()
        for name in state.formats.attentions:
            with exchange.quantized_attention(state, name):
                products[name] = damage()
    return Damages(inputs, products, tried)


def _draw(trajectories: Trajectories, seeds: Sequence[int], batch_size: int) -> Tensor:
    made = trajectories.run(seeds, batch_size=batch_size)
    assert made is not None
    return made.samples
