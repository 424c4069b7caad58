"""How many bits a quantized model keeps each layer in: as JSON, and in words for people.

Output channels may have different weight bits, and trajectory steps different activation bits. Their mean is then what
is shown, and how they are distributed stands beside it, such as "2.0 (1:10% 2:80% 3:10%)".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from quant_spec.formats import SUPPORTED_BITS, ActivationSpec, LayerSpec, ModelFormat, WeightSpec


@dataclass(frozen=True, slots=True)
class LayerBits:
    """Bits of one layer.

    Attributes
    ----------
    weights, activations
        Mean bits of a weight, and of an input over the trajectory: an int where all are the same, None in full
        precision.
    mixture
        (bits, number of output channels), bits rising, where channels differ.
    step_bits
        Bits of the inputs at each trajectory step, noisiest first, where steps differ.
    table
        Bits of the table of its outputs that is kept in place of the layer.
    low_rank
        Rank of the 16-bit branch beside the codes, 0 without one.
    types
        Number types of weights and activations that are not integers: "e4m3".
    is_dropped
        Nothing needs the layer's outputs, so that it is not kept at all.
    """

    weights: float | None = None
    activations: float | None = None
    mixture: tuple[tuple[int, int], ...] = ()
    step_bits: tuple[int, ...] = ()
    table: int | None = None
    is_dropped: bool = False
    low_rank: int = 0
    types: tuple[str | None, str | None] = (None, None)

    @classmethod
    def of(cls, spec: LayerSpec) -> Self:
        """Return the bits of a layer's format."""
        weight, activation = spec.weight, spec.activation
        weights = weight.bits_mean if weight.mixture else weight.bits
        types = tuple(each.type.value if each is not None and each.is_float else None for each in (weight, activation))
        more: dict[str, Any] = {"low_rank": spec.low_rank, "types": types}
        if activation is None:
            return cls(weights, mixture=weight.mixture, **more)
        activations = activation.bits_mean if activation.step_bits else activation.bits
        return cls(weights, activations, weight.mixture, activation.step_bits, **more)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(
            weights=data["weights"],
            activations=data["activations"],
            mixture=tuple((bits, count) for bits, count in data.get("mixture", ())),
            step_bits=tuple(data.get("step_bits", ())),
            table=data.get("table"),
            is_dropped=data.get("is_dropped", False),
            low_rank=data.get("low_rank", 0),
            types=tuple(data.get("types", (None, None))),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping; besides the means it says only what there is."""
        more = {
            "mixture": [list(entry) for entry in self.mixture],
            "step_bits": list(self.step_bits),
            "table": self.table,
            "is_dropped": self.is_dropped,
            "low_rank": self.low_rank,
            "types": list(self.types) if any(self.types) else [],
        }
        return {
            "weights": _rounded(self.weights),
            "activations": _rounded(self.activations),
            **{name: value for name, value in more.items() if value},
        }

    @property
    def weights_text(self) -> str | None:
        """Bits of the weights, or of the table that stands for them; None in full precision."""
        if self.is_dropped:
            return "not kept"
        if self.table is not None:
            return f"table of {self.table}"
        if self.weights is None:
            return None
        rank = f" + rank {self.low_rank}" if self.low_rank else ""
        return (self.types[0] or _text(self.weights, self.mixture)) + rank

    @property
    def activations_text(self) -> str | None:
        """Bits of the inputs; None in full precision, or if there is no layer to have inputs."""
        if self.activations is None:
            return None
        return self.types[1] or _text(self.activations, sorted(Counter(self.step_bits).items()))

    @property
    def text(self) -> str:
        """Both, such as "4/8" or "float/float"."""
        if self.is_dropped or self.table is not None:
            return str(self.weights_text)
        return f"{self.weights_text or 'float'}/{self.activations_text or 'float'}"


def layer_bits(model_format: ModelFormat) -> dict[str, LayerBits]:
    """Return the bits of every layer that is not kept in full precision."""
    return {
        **{name: LayerBits.of(spec) for name, spec in model_format.layers.items()},
        **{name: LayerBits(table=spec.bits) for name, spec in model_format.features.items()},
        **{name: LayerBits(is_dropped=True) for name in model_format.unserved},
    }


def weight_bits_text(spec: WeightSpec) -> str:
    """Return the bits of a weight format for people."""
    return spec.type.value if spec.is_float else _text(spec.bits_mean if spec.mixture else spec.bits, spec.mixture)


def activation_bits_text(spec: ActivationSpec) -> str:
    """Return the bits of an activation format for people."""
    if spec.is_float:
        return spec.type.value
    return _text(spec.bits_mean if spec.step_bits else spec.bits, sorted(Counter(spec.step_bits).items()))


def _text(mean: float, counts: Sequence[tuple[int, int]]) -> str:
    """Return the mean, and the shares of each width where they differ."""
    if len(counts) < 2:
        return f"{mean:g}"
    total = sum(count for _, count in counts)
    shares = " ".join(f"{bits}:{_percent(count / total)}" for bits, count in counts)
    return f"{f'{mean:.2f}'.removesuffix('0')} ({shares})"


def _percent(share: float) -> str:
    """Return a share in percent, with a decimal where it would else read as none or all."""
    return f"{100 * share:.0f}%" if 0.01 <= share <= 0.99 else f"{100 * share:.1f}%"


def _rounded(mean: float | None) -> float | None:
    return round(mean, 6) if isinstance(mean, float) else mean


def nearest_width(bits: float) -> int:
    """Return the width of codes that is nearest to a mean, of two the smaller."""
    return min(SUPPORTED_BITS, key=lambda width: abs(width - bits))
