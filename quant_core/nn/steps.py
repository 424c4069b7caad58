"""The trajectory step of the forward pass that is running.

A per-step table has one entry per trajectory step. `StepClock` turns the timestep that the denoiser is called with into
indices of such tables, once per forward, so that a batch may mix timesteps.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant_core.errors import ConditioningError, TrajectoryError, UnknownTimestepError
from quant_core.nn.model_dtype import model_dtype
from quant_spec.enums import UnknownTimestep

_TIMESTEP_NAMES = ("timestep", "timesteps", "t")
_LABEL_NAME = "class_labels"
#: Added where a number of steps alone gives the trajectory, and where it does not.
_OWN = ", and that scheduler's own sigmas and timesteps, not others that a pipeline sets"
_ELSE = ", and with what else its README.md calls it with (such as sigmas, timesteps or strength)"


class StepClock:
    """Holds the trajectory-step index of the samples that are in flight.

    `index` is that on a device, shape () or (B,); `step` is the same number, where the host knows it and it is one.

    Where layers hold differences between steps (`follows`), it also counts trajectories: `moment` is the running
    trajectory's number and its step. Steps must then follow each other, and the host looks at every timestep.

    Parameters
    ----------
    timesteps : sequence of float
        The sampler's timesteps in the order of sampling; empty for a model without per-step tables.
    unknown : UnknownTimestep
        What to do at any other timestep.
    num_inference_steps : int, optional
        What a sampler is told to take these; by default, as many as there are.

    Notes
    -----
    Where a timestep comes more than once, the first of its entries is taken: they are alike.
    """

    def __init__(
        self,
        timesteps: Sequence[float],
        unknown: UnknownTimestep = UnknownTimestep.ERROR,
        num_inference_steps: int | None = None,
    ) -> None:
        self.timesteps = torch.tensor(tuple(timesteps), dtype=torch.float64)
        self.unknown = unknown
        self.num_inference_steps = num_inference_steps or len(self.timesteps)
        self.model = "this model"
        self.tolerance = _tolerance(self.timesteps)
        self.largest = float(self.timesteps.abs().max()) if len(self.timesteps) else 0.0
        self.waits = True
        self.follows = False
        self.moment: tuple[int, int] = (0, -1)
        self.device = torch.device("cpu")
        self.step: int | None = 0
        self.index: Tensor = torch.zeros((), dtype=torch.long)
        self.label: Tensor = torch.zeros((), dtype=torch.long)

    @property
    def steps(self) -> int:
        """Number of trajectory steps, at least 1 (tables of a model without steps have one entry)."""
        return max(1, len(self.timesteps))

    def run_on(self, device: torch.device) -> None:
        """Look up on `device` from now on, without the host waiting for it.

        What would be an error is a failed assertion of the device then, and there are no warnings. A clock that follows
        trajectories still makes the host wait, once a call.
        """
        self.device = device
        if self.follows:
            return
        self.timesteps = self.timesteps.to(device)
        self.waits = False

    def set_timestep(self, timestep: Tensor | float, dtype: torch.dtype = torch.float32) -> None:
        """Look up `timestep` (scalar or shape (B,)); sets `index`, shape () if all are at one step, else (B,), int64.

        A `dtype` narrower than float32 is what the model computes in: timesteps may have been rounded to it.

        Raises
        ------
        UnknownTimestepError
            If a timestep is not one of the trajectory's and `unknown` is ERROR.
        TrajectoryError
            If layers hold differences, and this is neither the next step nor the first.
        """
        if len(self.timesteps) == 0:
            return
        if self.follows:
            self._follow(timestep, dtype)
            return
        if not self._may_wait():
            self.index, self.step = self._look_up(timestep, dtype), None
            return
        index = self._find(timestep, dtype)
        # One step for all, which is the rule, is one grid for the whole batch: backends then need no run per sample.
        self.index = index[0] if index.dim() and bool((index == index[0]).all()) else index
        self.step = int(self.index) if self.index.dim() == 0 else None

    def _find(self, timestep: Tensor | float, dtype: torch.dtype) -> Tensor:
        """Return the step of each timestep, shape () or (B,), on the host; of equal timesteps the first."""
        wanted = torch.as_tensor(timestep).detach().to("cpu", torch.float64)
        wanted = wanted.reshape(()) if wanted.numel() == 1 else wanted.reshape(-1)
        distance, index = (wanted[..., None] - self.timesteps).abs().min(dim=-1)
        is_far = distance > self._allowed(timestep, dtype)
        if bool(is_far.any()):
            self._handle_unknown(wanted, is_far)
        return index

    @torch.compiler.disable
    def _follow(self, timestep: Tensor | float, dtype: torch.dtype) -> None:
        """Go on to the next step of the running trajectory, or start another."""
        found = self._find(timestep, dtype).reshape(-1)
        first, (trajectory, last) = int(found[0]), self.moment
        if bool((found != first).any()):
            raise TrajectoryError(
                f"timestep: got steps {sorted(set(found.tolist()))} in one batch, wanted one step for all: layers of "
                f"{self.model} hold differences between steps"
            )
        # Of timesteps that a sampler has twice, the one whose turn it is.
        step = last + 1 if self._equal(last + 1, first) else first
        if step == 0:
            self.moment = (trajectory + 1, 0)
        elif step == last + 1:
            self.moment = (trajectory, step)
        else:
            before = f"after step {last}" if last >= 0 else "as the first call"
            raise TrajectoryError(
                f"timestep: got {float(self.timesteps[first]):g}, step {first} of {self.steps}, {before}, wanted "
                f"{self._expected(last)}: layers of {self.model} hold differences between steps, so run all of a "
                f"trajectory, with num_inference_steps={self.steps}"
            )
        self.step = step
        self.index = torch.tensor(step).to(self.device)

    def _equal(self, step: int, other: int) -> bool:
        """Whether two steps have one timestep; False if `step` is beyond the end."""
        return step < len(self.timesteps) and bool(self.timesteps[step] == self.timesteps[other])

    def _expected(self, last: int) -> str:
        """Say which calls may follow step `last`."""
        start = f"step 0 ({float(self.timesteps[0]):g})"
        following = last + 1
        if not 0 < following < self.steps:
            return start
        return f"step {following} ({float(self.timesteps[following]):g}), or {start}"

    def set_label(self, label: Tensor | None, labels: int) -> None:
        """Remember the class labels, shape () or (B,), for tables that have a row for each of `labels` of them.

        Raises
        ------
        ConditioningError
            If there are none, or one is outside 0 to `labels` - 1.
        """
        if label is None:
            raise ConditioningError(f"class_labels: got none, wanted labels 0 to {labels - 1}")
        if not self._may_wait():
            wanted = (
                torch.as_tensor(label).detach().to(self.timesteps.device, torch.long, non_blocking=True).reshape(-1)
            )
            torch._assert_async(((wanted >= 0) & (wanted < labels)).all(), f"class_labels: wanted 0 to {labels - 1}")
            self.label = wanted.reshape(()) if wanted.numel() == 1 else wanted
            return
        wanted = torch.as_tensor(label).detach().to("cpu", torch.long).reshape(-1)
        if bool(((wanted < 0) | (wanted >= labels)).any()):
            raise ConditioningError(f"class_labels: got {wanted.tolist()}, wanted labels 0 to {labels - 1}")
        self.label = wanted.reshape(()) if wanted.numel() == 1 else wanted

    def rows(self, labels: int) -> Tensor:
        """Return each sample's row, shape () or (B,), of a table with a row for each step and each of `labels`."""
        return self.index if labels == 1 else self.index * labels + self.label

    def _may_wait(self) -> bool:
        """Whether values may be looked at from Python: not while compiling, and not if they are on a GPU."""
        return self.waits and not torch.compiler.is_compiling()

    def _look_up(self, timestep: Tensor | float, dtype: torch.dtype) -> Tensor:
        """Find steps where `timesteps` are."""
        device = self.timesteps.device
        wanted = torch.as_tensor(timestep).detach().to(device, torch.float64, non_blocking=True)
        wanted = wanted.reshape(()) if wanted.numel() == 1 else wanted.reshape(-1)
        distance, index = (wanted[..., None] - self.timesteps).abs().min(dim=-1)
        if self.unknown is UnknownTimestep.ERROR:
            is_near = distance <= self._allowed(timestep, dtype)
            torch._assert_async(is_near.all(), "timestep: wanted one of the calibrated trajectory")
        return index

    def _allowed(self, timestep: Tensor | float, dtype: torch.dtype) -> float:
        """Return how far a timestep may be from the trajectory's: as its dtype, or the model's, rounds the largest one.

        Of the largest, as pipelines round before they scale and turn around (1 - t). Integers are exact.
        """
        if isinstance(timestep, Tensor) and not timestep.is_floating_point():
            return self.tolerance
        own = timestep.dtype if isinstance(timestep, Tensor) else torch.float32
        return max(self.tolerance, self.largest * max(torch.finfo(each).eps for each in (own, dtype)))

    def _handle_unknown(self, wanted: Tensor, is_far: Tensor) -> None:
        first = wanted.reshape(-1)[is_far.reshape(-1)][0].item()
        count = len(self.timesteps.unique())
        grid = f"{count} steps, {self.timesteps.max().item():g} to {self.timesteps.min().item():g}"
        if self.unknown is UnknownTimestep.ERROR:
            raise UnknownTimestepError(
                f"timestep: got {first:g}, wanted one of the trajectory that {self.model} was calibrated on ({grid}); "
                f"sample with the scheduler in its scheduler/ folder and num_inference_steps={self.num_inference_steps}"
                + (_OWN if count == self.num_inference_steps else _ELSE)
            )
        warnings.warn(
            f"timestep {first:g} is not in the calibrated trajectory ({grid}); using the nearest step", stacklevel=3
        )

    def gather(self, table: Tensor, x: Tensor) -> Tensor:
        """Return the entries of `table`, shape (S,), for the samples of `x`, shaped to broadcast against it.

        Rows of `x` that belong to one sample (heads, frames) must be adjacent: dim 0 is a multiple of the batch.
        """
        if len(table) == 1:
            return table[0]
        index = self.index.to(table.device)
        rows = table.index_select(0, index.reshape(-1))  # table[index] would read a single index on the host
        if index.dim() == 0:
            return rows[0]
        if x.shape[0] != len(rows):
            rows = rows[:, None].expand(-1, x.shape[0] // len(rows)).reshape(-1)
        return rows.reshape(-1, *(1,) * (x.dim() - 1))


def _tolerance(timesteps: Tensor) -> float:
    """Return how far a timestep may be from one of these: 0.001, or a quarter of the least gap, if that is less."""
    gaps = timesteps.sort().values.diff()
    gaps = gaps[gaps > 0]
    return min(1e-3, float(gaps.min()) / 4) if len(gaps) else 1e-3


class _SetClock:
    """A hook before a model's forward; an object, so that a copied model sets its own clock."""

    def __init__(self, clock: StepClock, parameters: list[str], timestep: str, labels: int) -> None:
        self.clock, self.parameters, self.timestep, self.labels = clock, parameters, timestep, labels

    def __call__(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        timestep = self._argument(self.timestep, args, kwargs)
        self.clock.set_timestep(timestep, model_dtype(model))  # type: ignore[arg-type]
        if self.labels > 1:
            self.clock.set_label(self._argument(_LABEL_NAME, args, kwargs), self.labels)  # type: ignore[arg-type]

    def _argument(self, called: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        position = self.parameters.index(called)
        return args[position] if len(args) > position else kwargs.get(called)


def attach_clock(model: nn.Module, clock: StepClock, labels: int = 1) -> None:
    """Make every forward of `model` set `clock` from its timestep argument and, for more labels than 1, its labels."""
    clock.model = f"this {type(model).__name__}"
    parameters = list(inspect.signature(model.forward).parameters)
    name = next((n for n in _TIMESTEP_NAMES if n in parameters), None)
    if name is None:
        if len(clock.timesteps):
            raise UnknownTimestepError(
                f"{type(model).__name__}.forward takes no timestep, so it can't be quantized per step"
            )
        return
    model.register_forward_pre_hook(_SetClock(clock, parameters, name, labels), with_kwargs=True)
