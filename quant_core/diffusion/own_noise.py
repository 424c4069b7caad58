"""Noise that a pipeline draws from PyTorch's global generator, whatever generators its call is given.

Some do: a ControlNet of Stable Diffusion 3 samples the latents of its control image so, and a pipeline that hands its
scheduler no generator (Stable Diffusion 3's, Flux's) leaves one that adds noise at every step to draw it there. Unless
that noise is the seed's, too, a release is compared with samples of other noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Seed the global generators of the CPU and of a device, and leave them as they were found.

    Yields
    ------
    callable
        Tells whether anything was drawn from them since.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        before = _states(devices)
        yield lambda: not all(map(torch.equal, before, _states(devices)))


def _states(devices: list[torch.device]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
