"""LoRA files added to the weights of a pipeline, by the pipeline's own loader and peft."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant_core.errors import DenoiserError

#: Names of the first of a layer's two matrices: peft's, kohya's and older ones.
_FIRST = re.compile(r"(?:lora_A|lora_down|lora[._]down)(?:\.[^.]+)?\.weight$")

#: Kohya's name of the first of a query's, key's or value's two matrices, in a layer of a text encoder.
_KOHYA = re.compile(r"((lora_te\d?)_\w+_self_attn_)[qkv]_proj\.lora_down\.weight")


def fuse_loras(pipeline: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Add LoRA files to the weights of a pipeline's components, in place.

    Parameters
    ----------
    pipeline
        As from `quant_core.diffusion.pipeline.load_pipeline`, on the CPU in float32.
    loras : sequence of (Path, float)
        Safetensors files in any layout that the pipeline's `load_lora_weights` reads, and how much of each is added.

    Raises
    ------
    DenoiserError
        If the pipeline has no such loader, or a file cannot be read by it, or changes none of its components.
    """
    name = type(pipeline).__name__
    if not callable(getattr(pipeline, "load_lora_weights", None)):
        raise DenoiserError(f"{name}: got LoRA files, wanted a pipeline whose loader reads them")
    adapters = []
    for place, (path, _) in enumerate(loras):
        adapter = f"lora_{place}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                completed = _completed(path)
                if completed is None:
                    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter)
                else:
                    pipeline.load_lora_weights(completed, adapter_name=adapter)
        except Exception as error:  # loaders of many layouts, each with errors of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DenoiserError(f"LoRA {place + 1}: got {reason}, wanted a file that {name} loads") from error
        if not any(adapter in found for found in pipeline.get_list_adapters().values()):
            raise DenoiserError(
                f"LoRA {place + 1}: got a file that names no layer of what the loader of {name} reads "
                f"({', '.join(pipeline._lora_loadable_modules)}), wanted one made for it"
            )
        named, found = _count_named(path), _count_found(pipeline, adapter)
        if found < named:
            raise DenoiserError(
                f"LoRA {place + 1}: got a file for {named} layers, {named - found} of which its loader does not find "
                f"in {name}, wanted all of them: the model would be another one than meant"
            )
        adapters.append(adapter)
    pipeline.set_adapters(adapters, [scale for _, scale in loras])
    components = [part for part in pipeline._lora_loadable_modules if getattr(pipeline, part, None) is not None]
    pipeline.fuse_lora(components=components, adapter_names=adapters)
    pipeline.unload_lora_weights()


def _completed(path: Path) -> dict[str, Tensor] | None:
    """Return a file's tensors with what diffusers tells kohya's layout by; None if it is told without.

    It looks for an output projection among a text encoder's layers. Where a file has queries, keys or values alone, one
    that adds zero stands beside them.
    """
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    found = {match[2]: match for match in map(_KOHYA.fullmatch, names) if match is not None}
    lacking = [
        match
        for encoder, match in found.items()
        if not any(name.startswith(f"{encoder}_") and "_self_attn_out_proj." in name for name in names)
    ]
    if not lacking:
        return None
    tensors = load_file(path)
    for match in lacking:
        down, up = (tensors[match[0].replace("lora_down", kind)] for kind in ("lora_down", "lora_up"))
        zero = f"{match[1]}out_proj"
        tensors |= {f"{zero}.lora_down.weight": torch.zeros_like(down), f"{zero}.lora_up.weight": torch.zeros_like(up)}
        tensors[f"{zero}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def _count_named(path: Path) -> int:
    """Return for how many layers a file has a first matrix, in any of the layouts that loaders read."""
    with safe_open(path, framework="pt") as file:
        return sum(_FIRST.search(name) is not None for name in file.keys())  # noqa: SIM118 - not a mapping


def _count_found(pipeline: Any, adapter: str) -> int:
    """Return how many layers of a pipeline an adapter was added to; a layer of the file may be several of these."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    layers = (module for part in parts for module in part.modules())
    return sum(adapter in getattr(layer, "lora_A", ()) for layer in layers)


def write_changed(part: nn.Module, folder: Path, target: Path) -> bool:
    """Write the weight files of a component whose numbers changed, in the names and dtypes of its folder's files.

    Parameters
    ----------
    folder : Path
        The component's, with safetensors files.
    target : Path
        Gets the files that changed.

    Returns
    -------
    bool
        Whether anything did.

    Raises
    ------
    DenoiserError
        If a LoRA gave a tensor another shape (those of Flux's control pipelines do).
    """
    state = part.state_dict()
    changed = False
    for path in sorted(folder.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        differs = False
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - not a mapping
                stored = file.get_tensor(name)
                if name in state and state[name].shape != stored.shape:
                    shapes = " of ".join(str(tuple(each.shape)) for each in (state[name], stored))
                    raise DenoiserError(f"LoRA: got a file that makes {name} {shapes}, wanted one that keeps shapes")
                if name in state:
                    tensors[name] = state[name].detach().to("cpu", stored.dtype).contiguous()
                else:
                    tensors[name] = stored
                differs = differs or not torch.equal(tensors[name], stored)
        if differs:
            target.mkdir(parents=True, exist_ok=True)
            save_file(tensors, target / path.name, metadata=metadata or {"format": "pt"})
            changed = True
    return changed
