"""What goes into a unit and comes out of it over a calibration set, kept within a stated memory budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant_core.diffusion.calibration import Batch, CalibrationSet, replay
from quant_core.fit.observe import stop_after


class SampleStore:
    """Rows of one tensor for every calibration sample: float32 in memory, or bfloat16 in a memory-mapped file."""

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype, spill: Path | None) -> None:
        self.dtype = dtype
        if spill is None or not dtype.is_floating_point:
            self.data = torch.empty(rows, *shape, dtype=dtype)
        else:
            size = rows * math.prod(shape)
            self.data = torch.from_file(str(spill), shared=True, size=size, dtype=torch.bfloat16).reshape(rows, *shape)

    def put(self, first: int, x: Tensor) -> None:
        """Store consecutive rows."""
        self.data[first : first + len(x)] = x.detach().to("cpu", self.data.dtype)

    def get(self, index: Tensor, device: torch.device | str) -> Tensor:
        """Return rows at `index`, shape (B,), in the dtype that they came in."""
        return self.data[index].to(device, self.dtype)


@dataclass(slots=True)
class Side:
    """The arguments (or the results) of a unit as a tree: leaves that vary with the sample, and constants."""

    spec: Any
    leaves: list[SampleStore | Any]

    def batch(self, index: Tensor, device: torch.device | str) -> Any:
        """Rebuild the arguments (or results) for the samples at `index`."""
        values = [leaf.get(index, device) if isinstance(leaf, SampleStore) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(values, self.spec)


@dataclass(frozen=True, slots=True)
class Recording:
    """A unit's inputs ((args, kwargs)) and outputs over the calibration set; index = step * samples + row."""

    inputs: Side
    outputs: Side


class _Tap:
    """Catches what passes through one module."""

    def __init__(self) -> None:
        self.inputs: tuple[Any, Any] | None = None
        self.outputs: Any = None

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.inputs = (args, kwargs)

    def after(self, _: nn.Module, args: Any, output: Any) -> None:
        self.outputs = output


def record_unit(
    model: nn.Module, unit: str, calibration: CalibrationSet, *, batch_size: int, budget: int, scratch: Path, label: str
) -> Recording:
    """Run `model` over the calibration set until `unit` has run, and keep what went in and out.

    Parameters
    ----------
    budget : int
        Bytes that may stay in memory; what is larger lies in `scratch` as bfloat16 memory maps.
    """
    module = model.get_submodule(unit)
    tap = _Tap()
    handles = [
        module.register_forward_pre_hook(tap.before, with_kwargs=True),
        module.register_forward_hook(tap.after),
    ]
    sides: dict[str, Side] = {}
    try:
        with stop_after(model, [unit]) as call, torch.no_grad():

            def run(batch: Batch) -> Mapping[str, Any]:
                call(lambda: replay(model, batch))
                return {"inputs": tap.inputs, "outputs": tap.outputs}

            one, two = run(calibration.rows(0, 0, 1)), run(calibration.gather(torch.zeros(2, dtype=torch.long)))
            for side in ("inputs", "outputs"):
                sides[side] = _allocate(
                    one[side], two[side], len(calibration), budget // 2, scratch / f"{label}_{side}"
                )
            first = 0
            for batch in calibration.by_step(batch_size):
                caught = run(batch)
                for side, store in sides.items():
                    _put(store, caught[side], first)
                first += len(batch)
    finally:
        for handle in handles:
            handle.remove()
    return Recording(sides["inputs"], sides["outputs"])


def _allocate(one: Any, two: Any, rows: int, budget: int, prefix: Path) -> Side:
    """Make room for a tree; a leaf varies with the sample if its first dimension does with the batch."""
    leaves, spec = pytree.tree_flatten(one)
    others = pytree.tree_leaves(two)
    varies = [
        isinstance(a, Tensor) and a.dim() > 0 and b.shape[0] == 2 * a.shape[0]
        for a, b in zip(leaves, others, strict=True)
    ]
    size = sum(rows * leaf[0].numel() * leaf.element_size() for leaf, v in zip(leaves, varies, strict=True) if v)
    made: list[SampleStore | Any] = []
    for i, (leaf, v) in enumerate(zip(leaves, varies, strict=True)):
        if not v:
            made.append(leaf)
            continue
        spill = Path(f"{prefix}_{i}.bf16") if size > budget else None
        made.append(SampleStore(rows, tuple(leaf.shape[1:]), leaf.dtype, spill))
    return Side(spec, made)


def _put(side: Side, caught: Any, first: int) -> None:
    for leaf, value in zip(side.leaves, pytree.tree_leaves(caught), strict=True):
        if isinstance(leaf, SampleStore):
            leaf.put(first, value)
