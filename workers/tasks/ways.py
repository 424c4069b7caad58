"""Ways of calling a denoiser whose times are compared: as it is, replayed from a CUDA graph, its blocks compiled.

On a GPU a step that is called as it is waits for the host, which launches some thousand kernels; a CUDA graph launches
them at once. So graphs are how steps are compared there, of the release and of its original alike. The compiler's
counterpart is a model whose repeated blocks are compiled (`repeated_blocks`), in seconds where the whole takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from quant_core.runtime.replayed import why_not_replayed
from quant_spec.tasks.bench import BY_BLOCK, EAGER, GRAPH, WHOLE

# Kernels are the same with and without a graph, but libraries may choose others for it; a wrong step is far beyond.
GRAPH_TOLERANCE = 0.01
# Classes that models repeat without naming them in diffusers' `_repeated_blocks`.
_BLOCKS = frozenset({"BasicTransformerBlock", "JointTransformerBlock", "ResnetBlock2D"})
# Shapes of a block, times batch sizes, that are compiled for before dynamo gives up: SDXL's ResNet blocks have 11.
_RECOMPILES = 128


class GraphError(Exception):
    """A replay does not give what the model gives."""


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
    reason = next(filter(None, map(why_not_replayed, models)), None)
    return (GRAPH, None) if reason is None else (EAGER, reason)


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
