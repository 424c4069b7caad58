"""Forwards of which the beginning is remembered: what runs before a changed layer is not computed again.

No model is named: what ran before what is seen in one forward, and modules that ran before give back what they gave
then. Only what lies between them (sums, concatenations, norms outside of units) is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(slots=True)
class _Seen:
    """One module in one forward: when its first call began and its last ended, and what its calls gave."""

    begin: int = -1
    end: int = -1
    outputs: list[Any] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)

    def is_whole(self) -> bool:
        """Whether nothing that was given has been written over since."""
        return all(_versions(output) == versions for output, versions in zip(self.outputs, self.versions, strict=True))


class Prefix:
    """What the modules of a model gave in one forward.

    Parameters
    ----------
    model : nn.Module
    units : sequence of str
        Modules that are remembered as wholes.
    layers : mapping of str to str
        Modules that may be changed, each with the unit that it lies in; they are remembered too, for the layers of
        their own unit that run later.
    """

    def __init__(self, model: nn.Module, units: Sequence[str], layers: Mapping[str, str]) -> None:
        self.model, self.units, self.layers = model, tuple(units), dict(layers)
        self._seen: dict[str, _Seen] = {}

    def record(self, forward: Callable[[], Tensor]) -> Tensor:
        """Run a forward, remember it in place of the last one, and return what it gave."""
        seen: dict[str, _Seen] = {name: _Seen() for name in {*self.units, *self.layers}}
        clock = iter(range(1 << 62))

        def before(name: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                if seen[name].begin < 0:
                    seen[name].begin = next(clock)

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, output: object) -> None:
                seen[name].end = next(clock)
                seen[name].outputs.append(output)
                seen[name].versions.append(_versions(output))

            return hook

        handles = []
        for name in seen:
            module = self.model.get_submodule(name)
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        try:
            result = forward()
        finally:
            for handle in handles:
                handle.remove()
        # An output that was written over later is not what the module gave: such a module runs again.
        self._seen = {name: each for name, each in seen.items() if each.outputs and each.is_whole()}
        self._order = {name: each.begin for name, each in seen.items() if each.begin >= 0}
        return result

    @contextmanager
    def before(self, layer: str) -> Iterator[None]:
        """Let all that ended before `layer` began give what it gave in the recorded forward.

        A layer that was not called runs nothing again.
        """
        begin, unit = self._order.get(layer, 1 << 62), self.layers[layer]
        names = [*self.units, *(name for name, own in self.layers.items() if own == unit)]
        replaced = {name for name in names if name in self._seen and self._seen[name].end < begin}
        modules = []
        try:
            for name in replaced:
                module = self.model.get_submodule(name)
                module.forward = _Replay(self._seen[name].outputs)
                modules.append(module)
            yield
        finally:
            for module in modules:
                del module.forward  # what is left is the class's own


class _Replay:
    """Stands in for a module's forward: its recorded outputs, call by call."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self.outputs, self.calls = outputs, 0

    def __call__(self, *_: Any, **__: Any) -> Any:
        output = self.outputs[self.calls % len(self.outputs)]
        self.calls += 1
        return output


def _versions(output: Any) -> list[int]:
    """Return how often the tensors of an output have been written to."""
    return [leaf._version for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
