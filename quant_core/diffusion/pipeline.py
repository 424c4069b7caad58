"""A whole diffusers pipeline around a denoiser, and one call of it.

No pipeline class is named here: what a pipeline's call takes is read from its signature.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from quant_core.errors import DenoiserError
from quant_spec.documents import read_json_file
from quant_spec.errors import QuantServiceError
from quant_spec.pictures import read_picture
from quant_spec.pipeline import DENOISERS, MODEL_INDEX, component_entries, denoiser_entry
from quant_spec.prompts import PromptFile, PromptLine
from quant_spec.sampler import Sampler


def load_pipeline(folder: Path, denoiser: nn.Module, scheduler: Any, *, reads_text: bool = True) -> Any:
    """Load the pipeline in a model's folder around a denoiser and a scheduler that are there already.

    Parameters
    ----------
    folder : Path
        Holds `model_index.json` and the components.
    denoiser : Module
        In full precision or quantized; takes the place of the folder's.
    scheduler
        A diffusers scheduler; takes the place of the folder's.
    reads_text : bool
        Whether text encoders and tokenizers are loaded; without them, prompts must be given encoded.

    Returns
    -------
    DiffusionPipeline
        All its components on the CPU, in float32 and eval mode, but the denoiser, which is left as it is.

    Raises
    ------
    DenoiserError
        If diffusers has no such pipeline, or cannot load it.
    """
    import diffusers  # seconds of import: only where a pipeline is really loaded

    index = read_json_file(folder / MODEL_INDEX, error=DenoiserError)
    name = denoiser_entry(index)
    cls = getattr(diffusers, str(index.get("_class_name")), None)
    if name is None or not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise DenoiserError(
            f"{folder / MODEL_INDEX}: got {index.get('_class_name')!r}, wanted a pipeline of diffusers "
            f"{diffusers.__version__} with a denoiser"
        )
    try:
        pipeline = cast(Any, cls).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            **{name: denoiser, "scheduler": scheduler},
            # Components that were left out: some pipelines must be told so again.
            **{part: None for part, entry in index.items() if isinstance(entry, list) and not any(entry)},
            **({} if reads_text else dict.fromkeys(filter(is_for_text, component_entries(index)))),
        )
    except Exception as error:  # every component has a loader of its own, which may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DenoiserError(
            f"{cls.__name__} in {folder}: got {reason}, wanted a pipeline that diffusers loads"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def is_for_text(component: str) -> bool:
    """Whether only the encoding of prompts needs a component, by its name."""
    return component.startswith(("text_encoder", "tokenizer"))


def place_pipeline(pipeline: Any, device: str) -> None:
    """Move a pipeline's components to a device, but for those without values, and let its call make inputs there."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and not any(value.is_meta for value in part.parameters()):
            part.to(device)
    where = torch.device(device)
    cls = type(pipeline)
    # Its own property takes the device of whichever component comes first, which may be the one without values.
    pipeline.__class__ = type(cls.__name__, (cls,), {"_execution_device": property(lambda _: where)})


def denoiser_of(pipeline: Any) -> nn.Module:
    """Return a pipeline's denoiser."""
    name = next(name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module))
    found: nn.Module = getattr(pipeline, name)
    return found


def decoder_of(pipeline: Any) -> nn.Module | None:
    """Return what turns a pipeline's latents into pixels; None if it denoises pixels."""
    found = (getattr(pipeline, name, None) for name in ("vae", "vqvae", "movq", "vqgan"))
    return next((part for part in found if isinstance(part, nn.Module) and hasattr(part, "decode")), None)


def call_parameters(pipeline: Any) -> dict[str, Any]:
    """Return what a pipeline's call takes: name to default, `inspect.Parameter.empty` where there is none."""
    parameters = inspect.signature(pipeline.__call__).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name: each.default for each in parameters if each.kind in kinds}


def call_arguments(
    pipeline: Any, sampler: Sampler, lines: Sequence[PromptLine], seeds: Sequence[int]
) -> dict[str, Any]:
    """Return the keywords of a pipeline's call that draws one sample for each seed.

    Parameters
    ----------
    lines : sequence of PromptLine
        One for each seed.

    Raises
    ------
    DenoiserError
        If the call does not take what the lines or the sampler's `arguments` say.
    """
    takes = call_parameters(pipeline)
    arguments: dict[str, Any] = {
        "num_inference_steps": sampler.num_inference_steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "np",
        "return_dict": False,
    }
    if lines[0].prompt is not None:
        arguments["prompt"] = [line.prompt for line in lines]
        if any(line.negative_prompt for line in lines) and "negative_prompt" in takes:
            arguments["negative_prompt"] = [line.negative_prompt or "" for line in lines]
    elif lines[0].class_label is not None:
        arguments["class_labels"] = [line.class_label for line in lines]
    for place, (name, _) in enumerate(lines[0].more):
        arguments[name] = _together(name, [line.more[place][1] for line in lines])
    optional = {"guidance_scale": sampler.guidance_scale, "eta": sampler.eta}
    arguments |= {name: value for name, value in optional.items() if name in takes and value is not None}
    arguments |= sampler.arguments
    if lines[0].size is not None:
        arguments |= {"height": lines[0].size[0], "width": lines[0].size[1]}
    if unknown := sorted(arguments.keys() - takes.keys()):
        raise DenoiserError(
            f"{type(pipeline).__name__}: got {', '.join(unknown)}, wanted what its call takes: {', '.join(takes)}"
        )
    return arguments


def call_pipeline(pipeline: Any, arguments: Mapping[str, Any]) -> Any:
    """Call a pipeline, and return what it gives.

    Raises
    ------
    DenoiserError
        If its call does not take what it is told, by its own word: the same would be said at every other try.
    """
    try:
        return pipeline(**arguments)
    except QuantServiceError:
        raise
    except (TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise DenoiserError(f"{type(pipeline).__name__}: its call raised {type(error).__name__}: {said}") from error


def _together(name: str, values: Sequence[str | PromptFile]) -> Any:
    """Return a keyword's values for a batch: texts, images, or arrays as one tensor with a row for each.

    Raises
    ------
    DenoiserError
        If a file is damaged, or arrays differ in shape.
    """
    if not all(isinstance(value, PromptFile) for value in values):
        return [value.name if isinstance(value, PromptFile) else value for value in values]
    files = [value for value in values if isinstance(value, PromptFile)]
    try:
        if files[0].is_image:
            return [read_picture(file.data).image for file in files]
        arrays = [torch.from_numpy(np.load(io.BytesIO(file.data), allow_pickle=False)) for file in files]
        return torch.stack([array.float() if array.is_floating_point() else array for array in arrays])
    except (OSError, ValueError, RuntimeError, SyntaxError, Warning) as error:
        raise DenoiserError(f"prompts: {name}: got {files[0].name} ({error}), wanted images or arrays") from error


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the keywords of a denoiser's call without what is None, with dotted keys for what is nested.

    Items of a sequence are numbered, `residuals.#0`; `quant_core.diffusion.denoiser.nest` turns them back.
    """
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat |= flatten({f"#{place}": item for place, item in enumerate(value)}, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat
