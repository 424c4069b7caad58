"""Ways of calling a denoiser whose times are compared: as it is, replayed from a CUDA graph, its blocks compiled.

On a GPU a step that is called as it is waits for the host, which launches some thousand kernels; a CUDA graph launches
them at once. So graphs are how steps are compared there, of the release and of its original alike. The compiler's
counterpart is a model whose repeated blocks are compiled (`repeated_blocks`), in seconds where the whole takes minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kernels.cuda_graph import captured
from quant_core.nn.steps import StepClock
from quant_spec.tasks.bench import BY_BLOCK, EAGER, GRAPH, WHOLE

# Kernels are the same with and without a graph, but libraries may choose others for it; a wrong step is far beyond.
GRAPH_TOLERANCE = 0.01
# Classes that models repeat without naming them in diffusers' `_repeated_blocks`.
_BLOCKS = frozenset({"BasicTransformerBlock", "JointTransformerBlock", "ResnetBlock2D"})
# Shapes of a block, times batch sizes, that are compiled for before dynamo gives up: SDXL's ResNet blocks have 11.
_RECOMPILES = 128

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]


class GraphError(Exception):
    """A model can't be captured, or a replay does not give what the model gives."""


class Replayed(nn.Module):
    """A denoiser that is called from CUDA graphs, of which it captures one for each shape of its arguments.

    Parameters
    ----------
    model : Module
        Not trained. Its hooks are part of what is captured.
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

    def __getattr__(self, name: str) -> Any:
        """Be asked for what the model is asked for: its config, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def _replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        """Capture a call with copies of these arguments; return the copies, and the replay."""
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        held = [leaf for leaf in own if isinstance(leaf, Tensor)]
        args, kwargs = pytree.tree_unflatten(own, structure)
        with torch.no_grad(), torch.cuda.device_of(held[0]):
            return held, self.capture(lambda: self.model(*args, **kwargs))


def check_replay(run: Callable[[], Tensor], replay: Callable[[], Tensor]) -> None:
    """Compare a replay with the call that it stands for, at the timestep that both are about to be called with.

    Raises
    ------
    GraphError
        If they differ by more than `GRAPH_TOLERANCE` of the norm.
    """
    want, got = run().float(), replay().float()
    off = float((got - want).norm() / want.norm())
    if not off <= GRAPH_TOLERANCE:
        raise GraphError(f"CUDA graph: got a relative difference of {off:g}, wanted at most {GRAPH_TOLERANCE:g}")


def choose_way(device: torch.device, models: Iterable[nn.Module]) -> tuple[str, str | None]:
    """Return how models are called that are compared on a device, all alike; and why not by a graph, on a GPU."""
    if device.type != "cuda":
        return EAGER, None
    for model in models:
        clocks = (getattr(module, "clock", None) for module in model.modules())
        if any(isinstance(clock, StepClock) and clock.follows for clock in clocks):
            return EAGER, "layers hold differences between steps, whose order the host follows"
    return GRAPH, None


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a denoiser repeats, which are compiled one by one; none if it has none that are known."""
    names = _BLOCKS | set(getattr(model, "_repeated_blocks", ()))
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_model(model: nn.Module, device: torch.device) -> str:
    """Compile a model in place, when it is called: on a GPU its repeated blocks, where it has some; say which."""
    blocks = repeated_blocks(model) if device.type == "cuda" else []
    if not blocks:
        model.compile()
        return WHOLE
    for block in blocks:
        block.compile(dynamic=False)
    return BY_BLOCK


def compiling_each_shape() -> AbstractContextManager[None]:
    """Let blocks be compiled for all of their shapes, where by default the ninth would run uncompiled."""
    limits: AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=_RECOMPILES, accumulated_recompile_limit=8 * _RECOMPILES
    )
    return limits
