"""`quantization_config`, the part of an artifact's config.json that says how the model is quantized.

Version 2 has each different format of a layer once, in the list `formats`; `layers` then has each layer's place in it
(docs/adr/0009-artifact-version-2.md). Version 3 is the same, of a model with integer scales of groups
(docs/adr/0017-integer-group-scales.md). Version 1, which is not written any more, has the format of every layer at
length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_spec.errors import QuantizationError
from quant_spec.formats import ModelFormat

QUANT_METHOD = "quantmill"
FORMAT_VERSION = 2
MULTIPLIED_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)


def quantization_config(model_format: ModelFormat) -> dict[str, Any]:
    """Return the `quantization_config` of config.json that describes a model quantized by it."""
    data = model_format.to_json()
    formats: list[Any] = []
    layers = {}
    for name, spec in data["layers"].items():
        if spec not in formats:
            formats.append(spec)
        layers[name] = formats.index(spec)
    is_multiplied = any(spec.weight.is_multiplied for spec in model_format.layers.values())
    version = MULTIPLIED_VERSION if is_multiplied else FORMAT_VERSION
    return {"quant_method": QUANT_METHOD, "version": version, **data, "layers": layers, "formats": formats}


def parse_quantization_config(data: Mapping[str, Any]) -> ModelFormat:
    """Read back what `quantization_config` wrote, in any version that was ever written.

    Raises
    ------
    QuantizationError
        If it is another tool's, of another version, or malformed.
    """
    if data.get("quant_method") != QUANT_METHOD:
        raise QuantizationError(f"quant_method: got {data.get('quant_method')!r}, wanted {QUANT_METHOD!r}")
    if data.get("version") not in READABLE_VERSIONS:
        wanted = " or ".join(map(str, READABLE_VERSIONS))
        raise QuantizationError(f"quantization_config version: got {data.get('version')!r}, wanted {wanted}")
    try:
        return ModelFormat.from_json(data if data["version"] == 1 else _spelled_out(data))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise QuantizationError(f"quantization_config: malformed: {type(error).__name__}: {error}") from error


def _spelled_out(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same with the format of every layer at length; IndexError if a place is not in the list."""
    formats = data["formats"]
    for place in data["layers"].values():
        if not 0 <= place < len(formats):
            raise IndexError(f"got format {place} of {len(formats)}")
    return {**data, "layers": {name: formats[place] for name, place in data["layers"].items()}}
