"""A model as the planner sees it: the JSON of its inspection, read into records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from quant_spec.enums import SampleSpace
from quant_spec.sampler import Sampler

#: What an inspection must have; one of an earlier version may lack some of it.
INSPECTED = frozenset(
    {
        *("units", "layers", "attentions", "temporal", "scheduler", "samples", "has_tokens"),
        *("missing_conditioning", "null_conditioning", "label_count"),
    }
)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One Conv or Linear layer: its weight's shape (C_out, C_in, *kernel), MACs per sample, parts of its input."""

    name: str
    type: str
    shape: tuple[int, ...]
    macs: int
    split: tuple[int, ...] | None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Columns of the weight matrix: taps times input channels."""
        return math.prod(self.shape[1:])

    @property
    def positions(self) -> int:
        """Output positions (pixels, tokens) per sample."""
        return max(1, self.macs // max(1, self.weights))

    @property
    def input_elements(self) -> int:
        """Elements of the layer's input per sample, as far as the inspection tells (exact at stride 1)."""
        return self.positions * self.shape[1]


@dataclass(frozen=True, slots=True)
class UnitInfo:
    """A unit, per sample: float32 bytes in and out, GMAC, share of a forward done when it ends (`depth`)."""

    name: str
    layers: tuple[LayerInfo, ...]
    attentions: tuple[str, ...]
    gmacs: float
    input_bytes: int
    output_bytes: int
    hessian_bytes: int
    depth: float

    def scaled(self, share: float) -> UnitInfo:
        """Return the unit on samples so many times as large."""
        return replace(
            self,
            layers=tuple(replace(layer, macs=int(layer.macs * share)) for layer in self.layers),
            gmacs=self.gmacs * share,
            input_bytes=int(self.input_bytes * share),
            output_bytes=int(self.output_bytes * share),
        )

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def input_elements(self) -> int:
        """Elements of all its layers' inputs per sample."""
        return sum(layer.input_elements for layer in self.layers)


@dataclass(frozen=True, slots=True)
class PipelineInfo:
    """A whole pipeline around a denoiser, per sample.

    `rows` of the denoiser's input where the call is guided, GMAC of encoding a prompt and of decoding, float32 bytes of
    the text encoders' weights and of all other components'; whether prompts are encoded by tasks of their own; numbers
    in each text encoder, by name.
    """

    rows: int
    image_shape: tuple[int, ...]
    encode_gmacs: float
    decode_gmacs: float
    text_bytes: int
    other_bytes: int
    encodes: bool
    text_encoders: Mapping[str, int]

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in float32."""
        return 4 * math.prod(self.image_shape)

    def rows_per_step(self, sampler: Sampler) -> int:
        """Return how many rows the denoiser's input has for one sample."""
        return self.rows if sampler.is_guided else 1


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A denoiser, per sample and forward; units in the order in which they run."""

    digest: str
    parameters: int
    sample_shape: tuple[int, ...]
    has_tokens: bool  # whether samples are packed tokens, (tokens, C), and not (C, ...)
    gmacs: float
    activation_bytes: int
    units: tuple[UnitInfo, ...]
    temporal: tuple[str, ...] | None  # layers of the temporal information block; None if not looked for
    samples: SampleSpace
    pipeline: PipelineInfo | None = None
    streamed: bool = False  # whether tasks that only read weights leave them in their files

    @classmethod
    def read(cls, digest: str, inspection: Mapping[str, Any]) -> Self:
        """Read the inspection of the model with this digest."""
        layers = {name: _layer(name, data) for name, data in inspection["layers"].items()}
        return cls(
            digest=digest,
            parameters=inspection["parameters"],
            sample_shape=tuple(inspection["sample_shape"]),
            has_tokens=inspection["has_tokens"],
            gmacs=inspection["forward_gmacs"],
            activation_bytes=inspection["activation_bytes"],
            units=tuple(_unit(data, layers) for data in inspection["units"]),
            temporal=tuple(inspection["temporal"]) if "temporal" in inspection else None,
            samples=SampleSpace(inspection["samples"]),
            pipeline=_pipeline(inspection.get("pipeline")),
            streamed=inspection.get("streamed", False),
        )

    def resized(self, arguments: Mapping[str, Any]) -> ModelInfo:
        """Return the model as a pipeline's call with these keywords has it: with other images, if they say a size.

        What is in proportion to the image's area counts as such: attention's squares are a little more.
        """
        whole = self.pipeline
        if whole is None or len(whole.image_shape) != 3:
            return self
        channels, height, width = whole.image_shape
        stated = arguments.get("height"), arguments.get("width")
        size = [own if told is None else told for told, own in zip(stated, (height, width), strict=True)]
        if not all(isinstance(side, int) and side > 0 for side in size):
            return self  # its call will say what is wrong
        share = size[0] * size[1] / (height * width)
        if share == 1:
            return self
        first, *rest = self.sample_shape
        shape = (round(first * share), *rest) if self.has_tokens else (first, *rest[:-1], round(rest[-1] * share))
        return replace(
            self,
            sample_shape=shape,
            gmacs=self.gmacs * share,
            activation_bytes=int(self.activation_bytes * share),
            units=tuple(unit.scaled(share) for unit in self.units),
            pipeline=replace(whole, image_shape=(channels, *size), decode_gmacs=whole.decode_gmacs * share),
        )

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """All layers in the order of their units."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def first_layer(self) -> str:
        """Name of the layer that reads the sample: the first convolution (else Linear) with as many input channels.

        Timestep embeddings run before it, so the first layer that runs is not the one that is meant.
        """
        layers = self.layers
        readers = [layer for layer in layers if layer.type != "Linear" and layer.shape[1] == self.sample_shape[0]]
        if not readers and self.has_tokens:
            readers = [layer for layer in layers if layer.shape[1] == self.sample_shape[1]]
        return (readers or layers)[0].name

    @property
    def last_layer(self) -> str:
        """Name of the layer that writes the prediction: the last one that runs."""
        return self.layers[-1].name


def _pipeline(data: Mapping[str, Any] | None) -> PipelineInfo | None:
    if data is None or data["problem"] is not None:
        return None
    others = [part for part in data["components"] if part["name"] != data["denoiser"]]
    return PipelineInfo(
        rows=data["rows"],
        image_shape=tuple(data["image_shape"]),
        encode_gmacs=data["encode_gmacs"],
        decode_gmacs=data["decode_gmacs"],
        text_bytes=4 * sum(part["parameters"] for part in others if part["name"].startswith("text_encoder")),
        other_bytes=4 * sum(part["parameters"] for part in others),
        encodes=data["encodes"],
        text_encoders={
            part["name"]: part["parameters"]
            for part in others
            if part["library"] == "transformers" and part["name"].startswith("text_encoder")
        },
    )


def _layer(name: str, data: Mapping[str, Any]) -> LayerInfo:
    split = data["split"]
    return LayerInfo(name, data["type"], tuple(data["shape"]), data["macs"], None if split is None else tuple(split))


def _unit(data: Mapping[str, Any], layers: Mapping[str, LayerInfo]) -> UnitInfo:
    return UnitInfo(
        name=data["name"],
        layers=tuple(layers[name] for name in data["layers"]),
        attentions=tuple(data.get("attention") or ()),
        gmacs=data["gmacs"],
        input_bytes=data["input_bytes"],
        output_bytes=data["output_bytes"],
        hessian_bytes=data["hessian_bytes"],
        depth=data["depth"],
    )
