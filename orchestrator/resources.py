"""What a task occupies."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resources:
    """What a task occupies while it runs: CPUs, GPUs that it cannot do without, bytes of host and of device memory.

    Without `gpu_memory_bytes` no GPU helps; with it, whether the task gets one is a matter of its job and of the
    cluster (`orchestrator.scheduling.placement`).
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0

    def __post_init__(self) -> None:
        amounts = (self.cpus, self.gpus, float(self.memory_bytes), float(self.gpu_memory_bytes))
        if not all(math.isfinite(amount) and amount >= 0 for amount in amounts):
            raise ValueError(f"resources: got {self}, wanted finite amounts of 0 or more")
