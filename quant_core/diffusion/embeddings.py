"""Prompts encoded once: what a pipeline's own `encode_prompt` gives for each line, kept and given again.

A file of embeddings is safetensors with a tensor for each item of what `encode_prompt` returns, (n, ...) with a row for
each of some lines (`lines`, (n,), has their places among all), or without rows where an item is the same for all.
Names are places in what it returns, such as "#0"; "structure" in the metadata has its form as JSON, null for None.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant_core.diffusion.pipeline import call_arguments, call_pipeline
from quant_core.errors import DenoiserError
from quant_spec.prompts import PromptLine
from quant_spec.sampler import Sampler

METHOD = "encode_prompt"
LINES = "lines"
_SHARED = "shared."


class _EncodedError(Exception):
    """Leaves a pipeline's call once its prompt is encoded."""


def encodes(pipeline: Any) -> bool:
    """Whether a pipeline has a method that encodes prompts."""
    return callable(getattr(pipeline, METHOD, None))


@torch.no_grad()
def encode(pipeline: Any, sampler: Sampler, lines: Sequence[PromptLine], seeds: Sequence[int], path: Path) -> None:
    """Write what a pipeline's `encode_prompt` gives for the seeds' lines, in its own call, to a file of embeddings.

    Raises
    ------
    DenoiserError
        If lines give different shapes, so that they make no batch; or it gives something else than tensors.
    """
    places = sorted({seed % len(lines) for seed in seeds})
    found = [_encoded(pipeline, sampler, lines[place]) for place in places]
    structure = _structure(found[0], "")
    flat = [_leaves(each) for each in found]
    tensors: dict[str, Tensor] = {LINES: torch.tensor(places)}
    for name, first in flat[0].items():
        every = [each.get(name) for each in flat]
        if any(value is None or value.shape != first.shape for value in every):
            raise DenoiserError(
                f"{type(pipeline).__name__}.{METHOD}: got other shapes for other prompts, wanted the same"
            )
        if first.dim() and len(first) == 1:
            tensors[name] = torch.cat([value for value in every if value is not None]).contiguous()
        elif all(value is not None and torch.equal(value, first) for value in every):
            tensors[_SHARED + name] = first.contiguous()
        else:
            raise DenoiserError(
                f"{type(pipeline).__name__}.{METHOD}: got {name} {tuple(first.shape)}, wanted a row a prompt"
            )
    save_file(tensors, path, metadata={"structure": json.dumps(structure)})


def _encoded(pipeline: Any, sampler: Sampler, line: PromptLine) -> Any:
    """Return what `encode_prompt` gives for one line inside the pipeline's call, on the CPU."""
    kept: list[Any] = []
    method = getattr(pipeline, METHOD)

    def seen(*args: Any, **kwargs: Any) -> Any:
        kept.append(method(*args, **kwargs))
        raise _EncodedError

    with _replaced(pipeline, seen):
        try:
            call_pipeline(pipeline, call_arguments(pipeline, sampler, [line], [0]))
        except _EncodedError:
            return kept[0]
    raise DenoiserError(f"{type(pipeline).__name__}: got no call of its {METHOD}, wanted one")


@contextmanager
def _replaced(pipeline: Any, function: Any) -> Iterator[None]:
    """Let a function stand in for a pipeline's `encode_prompt`."""
    # Not by the pipeline's own __setattr__, which takes every attribute for configuration.
    object.__setattr__(pipeline, METHOD, function)
    try:
        yield
    finally:
        object.__delattr__(pipeline, METHOD)


def _structure(value: Any, place: str) -> Any:
    """Return the form of what was returned: lists of forms, names of tensors, null."""
    if isinstance(value, list | tuple):
        return [_structure(item, f"{place}#{index}") for index, item in enumerate(value)]
    if isinstance(value, Tensor):
        return place or "#"
    if value is None:
        return None
    raise DenoiserError(f"{METHOD}: got a {type(value).__name__}, wanted tensors")


def _leaves(value: Any, place: str = "") -> dict[str, Tensor]:
    """Return the tensors of what was returned, by place."""
    if isinstance(value, list | tuple):
        return {k: v for index, item in enumerate(value) for k, v in _leaves(item, f"{place}#{index}").items()}
    return {place or "#": value.detach().cpu()} if isinstance(value, Tensor) else {}


class Embeddings:
    """A file of embeddings, to be given to a pipeline in the place of its text encoders."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as handle:
            self.tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            self.structure = json.loads(handle.metadata()["structure"])
        self._rows = {place: row for row, place in enumerate(self.tensors[LINES].tolist())}

    def rows(self, places: Sequence[int], device: torch.device) -> Any:
        """Return what `encode_prompt` gives for the lines at these places."""
        index = torch.tensor([self._rows[place] for place in places])

        def build(form: Any) -> Any:
            if isinstance(form, list):
                return tuple(build(item) for item in form)
            if form is None:
                return None
            shared = self.tensors.get(_SHARED + form)
            return (self.tensors[form][index] if shared is None else shared).to(device)

        return build(self.structure)


@contextmanager
def given(pipeline: Any, embeddings: Embeddings | None, places: Sequence[int]) -> Iterator[None]:
    """Give a pipeline the embeddings of the lines at these places, for as long as it is called."""
    if embeddings is None:
        yield
        return

    def encoded(*_: Any, **__: Any) -> Any:
        return embeddings.rows(places, pipeline._execution_device)

    with _replaced(pipeline, encoded):
        yield
