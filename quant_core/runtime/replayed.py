"""A model that is called from CUDA graphs: its kernels, launched at once.

A step on a GPU launches some thousand kernels, and the host takes longer to launch those of a quantized model than the
device to run them. A graph of them is launched in one call.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kernels.cuda_graph import captured
from quant_core.nn.steps import StepClock

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]


class Replayed(nn.Module):
    """A denoiser that is called from CUDA graphs, of which it captures one for each shape of its arguments.

    The first call with a shape takes as long as some calls of the model. What a graph gives is copied, so that a
    sampler may keep it. A graph keeps the memory of one call.

    Parameters
    ----------
    model : Module
        On a GPU, not trained. Its hooks are part of what is captured.
    capture : callable
        Makes a replay of a call that reads and writes the same memory each time.
    """

    def __init__(self, model: nn.Module, capture: Capture = captured) -> None:
        super().__init__()
        self.model, self.capture = model, capture
        self._graphs: dict[Any, tuple[list[Tensor], Callable[[], Any]]] = {}

        @functools.wraps(model.forward)  # so that it is asked for what the model takes
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._replay(args, kwargs)

        self.forward = forward
        self.train(model.training)

    def __getattr__(self, name: str) -> Any:
        """Be asked for what the model is asked for: its config, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Replayed:
        """Copy the model; graphs are of the memory of this one."""
        return Replayed(copy.deepcopy(self.model, memo), self.capture)

    def _replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = with_timestep(args, kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        forms = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = (forms, repr(structure))
        if key not in self._graphs:
            self._graphs[key] = self._capture(leaves, structure)
        held, replay = self._graphs[key]
        for place, value in zip(held, tensors, strict=True):
            place.copy_(value)
        # A sampler may keep what it was given before.
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, replay())

    def _capture(self, leaves: list[Any], structure: pytree.TreeSpec) -> tuple[list[Tensor], Callable[[], Any]]:
        """Capture a call with copies of these arguments, on the model's device; return the copies, and the replay."""
        state = (*self.model.parameters(), *self.model.buffers())
        device = next((tensor.device for tensor in state), torch.device("cpu"))
        own = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        held = [leaf for leaf in own if isinstance(leaf, Tensor)]
        args, kwargs = pytree.tree_unflatten(own, structure)
        with torch.no_grad(), torch.cuda.device_of(held[0]):
            return held, self.capture(lambda: self.model(*args, **kwargs))


def with_timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a timestep that is a whole number into a tensor, as diffusers' models do, so that one graph serves all.

    It is named, or follows the sample. Of other numbers, models make tensors of one dtype or another: each has a graph.
    """
    if type(kwargs.get("timestep")) is int:
        kwargs = kwargs | {"timestep": torch.tensor(kwargs["timestep"])}
    elif len(args) > 1 and type(args[1]) is int:
        args = (args[0], torch.tensor(args[1]), *args[2:])
    return args, kwargs


def why_not_replayed(model: nn.Module) -> str | None:
    """Say why a model's steps can't be replayed from graphs; None if nothing is known against it."""
    clocks = (getattr(module, "clock", None) for module in model.modules())
    if any(isinstance(clock, StepClock) and clock.follows for clock in clocks):
        return "layers hold differences between steps, whose order the host follows"
    return None
