"""What a pipeline's `model_index.json` says of its denoiser's samples: pixels, or latents to be decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quant_spec.enums import SampleSpace

MODEL_INDEX = "model_index.json"
#: Names that pipelines of diffusers give to what turns latents into pixels (and sound, and video).
DECODERS = ("vae", "vqvae", "movq", "vqgan")
#: Numbers of channels that pixels have.
PIXEL_CHANNELS = (1, 3)


def decoder_entries(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a `model_index.json` that name a decoder, which is there."""
    return {name: index[name] for name in DECODERS if _is_component(index.get(name))}


def _is_component(entry: Any) -> bool:
    """Whether an entry is a library and a class, and not two nulls for a component that was left out."""
    return isinstance(entry, list) and len(entry) == 2 and all(entry)


def sample_space(shape: Sequence[int], index: Mapping[str, Any] | None = None) -> SampleSpace:
    """Return what samples are.

    Parameters
    ----------
    shape
        Of one sample: (C, H, W) or any other.
    index
        The pipeline's `model_index.json`. Without one, images of 1 or 3 channels are taken for pixels.
    """
    if index is not None and decoder_entries(index):
        return SampleSpace.LATENTS
    pixels = len(shape) == 3 and shape[0] in PIXEL_CHANNELS
    return SampleSpace.PIXELS if pixels else SampleSpace.LATENTS


#: Libraries that components may come from: naming any other would import it.
LIBRARIES = ("diffusers", "transformers")
#: Names that pipelines of diffusers give to the network that is called at every step.
DENOISERS = ("unet", "transformer", "denoiser")

#: Keywords of a pipeline's call that are given by the recipe's own fields, by prompts, or by the seeds.
OWN_ARGUMENTS = frozenset(
    {
        *("prompt", "negative_prompt", "class_labels", "generator", "latents", "num_inference_steps", "guidance_scale"),
        *("eta", "output_type", "return_dict", "num_images_per_prompt", "callback_on_step_end"),
    }
)


def is_whole(index: Mapping[str, Any] | None) -> bool:
    """Whether an index is a pipeline's own, and not the decoders alone that are kept beside a denoiser."""
    return index is not None and isinstance(index.get("_class_name"), str)


def component_entries(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return a pipeline's components that are there: name to (library, class)."""
    return {
        name: (str(entry[0]), str(entry[1]))
        for name, entry in index.items()
        if not name.startswith("_") and _is_component(entry)
    }


def denoiser_entry(index: Mapping[str, Any]) -> str | None:
    """Return the name of a pipeline's denoiser; None if it has none that is known by its name."""
    return next((name for name in DENOISERS if _is_component(index.get(name))), None)
