"""A CUDA graph of a call: its kernels, launched at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Calls before a capture, in which kernels are compiled and libraries choose theirs.
CAPTURE_WARM_UP = 5


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that replays `run` from a CUDA graph; its output is overwritten by the next."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Any:
        graph.replay()
        return out

    return replay
