"""What a pipeline calls its text encoders with: the calibration set of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from quant_core.diffusion.pipeline import call_arguments, call_pipeline, denoiser_of
from quant_core.errors import DenoiserError
from quant_spec.prompts import PromptLine
from quant_spec.sampler import Sampler


@dataclass(frozen=True, slots=True)
class Call:
    """What a model was called with, a batch of samples along the first dimension of every tensor."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> None:
        """Call a model so."""
        model(*self.args, **self.kwargs)


class _EnoughError(Exception):
    """Leaves a pipeline's call where its denoiser would be called."""


@torch.no_grad()
def encoder_calls(
    pipeline: Any, component: str, sampler: Sampler, lines: Sequence[PromptLine], *, batch_size: int
) -> list[Call]:
    """Return what a pipeline calls a text encoder with for some lines, in order.

    The pipeline is called for each line by itself, as far as its denoiser, which needs no weights. Calls of the same
    form are joined to batches afterwards.

    Parameters
    ----------
    component
        The encoder's name.
    batch_size
        Samples of one call at most.

    Raises
    ------
    DenoiserError
        If the pipeline does not call it.
    """
    found: list[Call] = []
    encoder = getattr(pipeline, component)
    denoiser = denoiser_of(pipeline)

    def leave(*_: Any) -> None:
        raise _EnoughError

    handles = [
        encoder.register_forward_pre_hook(lambda _, args, kwargs: found.append(Call(args, kwargs)), with_kwargs=True),
        denoiser.register_forward_pre_hook(leave),
    ]
    try:
        for line in lines:
            try:
                call_pipeline(pipeline, call_arguments(pipeline, sampler, [line], [0]))
            except _EnoughError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise DenoiserError(f"{type(pipeline).__name__}: got no call of its {component}, wanted one for each prompt")
    return _batches(found, batch_size)


def _batches(calls: Sequence[Call], size: int) -> list[Call]:
    """Join calls that differ in their tensors' values alone, of one sample each, in order of their first."""
    groups: dict[Any, list[list[Any]]] = {}
    forms: dict[Any, TreeSpec] = {}
    for place, call in enumerate(calls):
        leaves, spec = tree_flatten((tuple(call.args), dict(call.kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        joins = all(leaf.dim() > 0 and len(leaf) == 1 for leaf in tensors)
        told = tuple(
            (tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
        )
        key = (str(spec), told, None if joins else place)
        groups.setdefault(key, []).append(leaves)
        forms[key] = spec
    joined = []
    for key, rows in groups.items():
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            leaves = [torch.cat(each) if isinstance(each[0], Tensor) and len(each) > 1 else each[0]
                      for each in zip(*batch, strict=True)]  # fmt: skip
            args, kwargs = tree_unflatten(leaves, forms[key])
            joined.append(Call(args, kwargs))
    return joined
