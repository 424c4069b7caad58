"""What is kept of a pipeline's `model_index.json` beside its denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant_spec.documents import read_json_file
from quant_spec.pipeline import MODEL_INDEX, PIXEL_CHANNELS, decoder_entries
from workers.errors import ModelError


def read_decoders(denoiser: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the decoders that a denoiser's pipeline has, as in its `model_index.json`.

    Parameters
    ----------
    denoiser
        The denoiser's folder. Its pipeline's, if there is any, is the one around it, and names it as a component.
    config
        The denoiser's.

    Returns
    -------
    dict or None
        None where nothing must be kept: there is none, or the number of channels alone tells that samples are no
        pixels. So a denoiser is the same model with and without its pipeline, but where that matters.

    Raises
    ------
    ModelError
        If the index is not JSON.
    """
    home = denoiser.resolve()
    path = home.parent / MODEL_INDEX
    if config.get("in_channels") not in PIXEL_CHANNELS or not path.is_file():
        return None
    index = read_json_file(path, error=ModelError)
    if not isinstance(index, dict) or home.name not in index:
        return None
    return decoder_entries(index) or None
