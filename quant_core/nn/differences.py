"""What a layer in differences remembers between the steps of a trajectory.

    q_t = Q_t(a_t - A_{t+1}),     A_t = A_{t+1} + q_t,     y_t = y_{t+1} + W q_t

A is the input that the layer stands for, in the input's own units, and y its output for A with the bias; both float32.
What Q leaves out is in the next difference, so that errors do not add up over steps (MoDiff, arXiv:2506.22463). A plain
step starts anew: A = Q(a), y = W A + bias. See docs/adr/0016-differences.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.errors import TrajectoryError
from quant_core.nn.steps import StepClock


@dataclass(slots=True)
class LayerMemory:
    """A and y of one layer, and the moment (trajectory, step) that they are of; empty between trajectories."""

    held: Tensor | None = None
    output: Tensor | None = None
    moment: tuple[int, int] = (0, -1)

    @torch.compiler.disable
    def recall(self, clock: StepClock, x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """Return A and y of the step before the one that runs.

        Parameters
        ----------
        clock : StepClock
        x : Tensor
            The layer's input, as it lies where `keep` was given A.
        layer : str
            What messages call it.

        Raises
        ------
        TrajectoryError
            If the last call of this layer was not at the step before, or had another batch.
        """
        trajectory, step = clock.moment
        if self.held is None or self.output is None or self.moment != (trajectory, step - 1):
            raise TrajectoryError(
                f"layer {layer}: got step {step} of a trajectory without its step {step - 1}, wanted one that runs "
                "from its first step, with every call complete"
            )
        if self.held.shape != x.shape:
            raise TrajectoryError(
                f"layer {layer}: got an input of shape {tuple(x.shape)} at step {step}, wanted "
                f"{tuple(self.held.shape)}, as at the step before: the batch of a trajectory may not change"
            )
        return self.held, self.output

    @torch.compiler.disable
    def keep(self, clock: StepClock, held: Tensor, output: Tensor, *, for_next: bool) -> None:
        """Remember A and y of the step that runs, if the next one asks for them; else forget all."""
        self.held, self.output = (held.detach(), output.detach()) if for_next else (None, None)
        self.moment = clock.moment

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        return sum(0 if tensor is None else tensor.nbytes for tensor in (self.held, self.output))
