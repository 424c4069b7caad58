"""The temporal information block of any denoiser: the layers that compute features of the timestep, not of the sample.

Found by following values through one forward. The sample, the timestep and every entry of the conditioning are
origins; what an operation gives has the origins of what it takes. A Conv or Linear layer belongs to the block if

- the timestep is among the origins of its input, and the sample is not;
- its input is one vector for each sample: text tokens that were modulated by the timestep are data, not time;
- whenever it is called, its input is the same (a transformer's blocks may share a time embedder).

In a UNet that is the time MLP and every block's time projection, in a transformer the time embedder and every adaLN
modulation. No model class is named.

What depends on the sample is followed as shapes without values (torch's meta device), so that the watch costs next to
nothing, whatever the model's and the batch's size; a model that cannot run so is run for real.

The same watch records the *program* of the block: the operations (activations, sums, slices) from its layers' outputs
to its layers' inputs, so that the block runs alone, with other layers in the place of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from quant_core.diffusion.conditioning import Conditioning
from quant_core.diffusion.denoiser import call_denoiser
from quant_core.nn.layers import QUANTIZABLE

SAMPLE, TIME = "sample", "timestep"
#: The one condition whose values can be listed.
LABEL = "class_labels"
_META = torch.device("meta")
_DEVICE = Tensor.device.__get__


@dataclass(frozen=True, slots=True)
class TemporalLayer:
    """One layer of the block.

    Attributes
    ----------
    sources : tuple of str
        Layers of the block whose outputs reach its input other than through further layers of the block.
    conditions : tuple of str
        Entries of the conditioning that its input depends on, besides the timestep.
    is_feature : bool
        Whether its output reaches something that depends on the sample other than through layers of the block.
    """

    sources: tuple[str, ...]
    conditions: tuple[str, ...]
    is_feature: bool

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        return {"sources": list(self.sources), "conditions": list(self.conditions), "is_feature": self.is_feature}


@dataclass(frozen=True, slots=True)
class _Call:
    """One operation of the program: a layer of the block (then `function` is its name), or a function of torch."""

    function: Any
    arguments: Any
    results: tuple[Tensor, ...]

    @property
    def is_layer(self) -> bool:
        return isinstance(self.function, str)


class TemporalProgram:
    """The block's own computation for the rows that it was recorded with.

    Parameters
    ----------
    calls : sequence of _Call
        In the order in which they ran; those that no layer of the block needs are left out.
    """

    def __init__(self, calls: Sequence[_Call]) -> None:
        needed: set[int] = set()
        kept = []
        for call in reversed(calls):
            if call.is_layer or any(id(result) in needed for result in call.results):
                needed.difference_update(id(result) for result in call.results)
                needed.update(id(leaf) for leaf in pytree.tree_leaves(call.arguments) if isinstance(leaf, Tensor))
                kept.append(call)
        self.calls = tuple(reversed(kept))

    def inputs(self) -> dict[str, Tensor]:
        """Return the layers' inputs as they were recorded, each of shape (rows, ..., C_in)."""
        return {call.function: call.arguments for call in self.calls if call.is_layer}

    def run(self, layers: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
        """Compute the outputs of all layers with `layers` in the place of the model's own; gradients flow."""
        values: dict[int, Tensor] = {}
        outputs = {}

        def current(leaf: Any) -> Any:
            return values.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        for call in self.calls:
            arguments = pytree.tree_map(current, call.arguments)
            if call.is_layer:
                values[id(call.results[0])] = outputs[call.function] = layers[call.function](arguments)
            else:
                results = _tensors(call.function(*arguments[0], **arguments[1]))
                values |= {id(old): new for old, new in zip(call.results, results, strict=True)}
        return outputs


@dataclass(frozen=True, slots=True)
class TemporalTrace:
    """What one forward showed: the block's layers by name, in the order in which they run, and their program."""

    layers: dict[str, TemporalLayer]
    program: TemporalProgram


def trace_temporal(model: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> TemporalTrace:
    """Find the temporal information block of a denoiser by one forward.

    Parameters
    ----------
    x : Tensor, shape (B, ...), dtype float32
    t : Tensor, shape (B,)
        Timesteps as the model takes them.
    conditioning : mapping of str to Tensor
        As for `call_denoiser`.

    Returns
    -------
    TemporalTrace
        Without layers if no layer of the model belongs to the block.
    """
    skipped: frozenset[str] = frozenset()
    while True:
        recorder = _Recorder(len(x), skipped)
        try:
            _watch(model, x, t, conditioning, recorder, shapes_only=True)
        except (RuntimeError, NotImplementedError):  # something looks at values of the sample, or at its device
            recorder = _Recorder(len(x), skipped)
            _watch(model, x, t, conditioning, recorder, shapes_only=False)
        differing = recorder.differing - skipped
        if not differing:
            return TemporalTrace(recorder.block(), TemporalProgram(recorder.calls))
        skipped |= differing


@dataclass(slots=True)
class _Recorder:
    """What a watched forward writes to.

    `origins` of each tensor that has any; `sources`: layers of the block that it was computed from, up to the last of
    them; `found`: origins and sources of the block's layers; `differing`: layers that would belong to the block but for
    another call with another input.
    """

    batch: int
    skipped: frozenset[str]
    origins: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    sources: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    calls: list[_Call] = field(default_factory=list)
    found: dict[str, tuple[frozenset[str], frozenset[str]]] = field(default_factory=dict)
    features: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    differing: set[str] = field(default_factory=set)

    def block(self) -> dict[str, TemporalLayer]:
        """Return the layers that were found."""
        order = {name: place for place, name in enumerate(self.found)}
        return {
            name: TemporalLayer(
                tuple(sorted(sources, key=order.__getitem__)), tuple(sorted(origins - {TIME})), name in self.features
            )
            for name, (origins, sources) in self.found.items()
        }

    def layer(self, name: str, x: Tensor, output: Tensor) -> None:
        """Note that a layer has run."""
        origins: frozenset[str] = self.origins.get(x, frozenset())
        is_vector = x.dim() >= 2 and x.shape[0] == self.batch and x.numel() == self.batch * x.shape[-1]
        is_temporal = TIME in origins and SAMPLE not in origins and is_vector
        is_same = is_temporal and name in self.found and torch.equal(self.inputs[name], x)
        if name in self.seen and not is_same and (is_temporal or name in self.found):
            self.differing.add(name)
        if is_temporal and name not in self.skipped:
            self.inputs.setdefault(name, x)
            self.found.setdefault(name, (origins, self.sources.get(x, frozenset())))
            self.calls.append(_Call(name, x, (output,)))
            self.sources[output] = frozenset({name})
        self.seen.add(name)

    def takes_sample(self, arguments: Any) -> bool:
        """Say whether an argument depends on the sample."""
        leaves = (leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))
        return any(SAMPLE in self.origins.get(leaf, ()) for leaf in leaves)

    def call(self, function: Any, arguments: Any, result: Any) -> None:
        """Note that a function of torch has run."""
        taken = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        given = _tensors(result)
        if function is Tensor.__setitem__:
            given = (taken[0],)
        origins = frozenset().union(*(self.origins.get(tensor, frozenset()) for tensor in taken))
        if not origins or not given:
            return
        sources = frozenset().union(*(self.sources.get(tensor, frozenset()) for tensor in taken))
        if SAMPLE in origins:
            self.features |= sources
            sources = frozenset()
        elif sources and function is not Tensor.__setitem__:
            self.calls.append(_Call(function, arguments, given))
        for tensor in given:
            self.origins[tensor], self.sources[tensor] = origins, sources


class _Follow(TorchFunctionMode):
    """Shows every function of torch to the recorder; with `shapes_only`, without values that depend on the sample."""

    def __init__(self, recorder: _Recorder, device: torch.device, *, shapes_only: bool) -> None:
        super().__init__()
        self.recorder, self.device, self.shapes_only = recorder, device, shapes_only

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = (args, kwargs)
        if self.shapes_only and self.recorder.takes_sample(given):
            if func == _DEVICE:  # where the values would be: what is made there may not depend on the sample
                return self.device
            given = pytree.tree_map(_shape_only, given)
        result = func(*given[0], **given[1])
        self.recorder.call(func, (args, kwargs), result)
        return result


def _shape_only(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return _META
    return leaf.to(_META) if isinstance(leaf, Tensor) else leaf


def _watch(
    model: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning, recorder: _Recorder, *, shapes_only: bool
) -> None:
    # Views of their own: the caller's tensors may be one object, or be used elsewhere.
    x, t = x.view_as(x), t.view_as(t)
    conditioning = {key: value.view_as(value) for key, value in conditioning.items()}
    for name, tensor in {SAMPLE: x, TIME: t, **conditioning}.items():
        recorder.origins[tensor] = frozenset({name})

    def leave(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            recorder.layer(name, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    with ExitStack() as cleanup, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QUANTIZABLE):
                cleanup.callback(module.register_forward_hook(leave(name), with_kwargs=True).remove)
        cleanup.enter_context(_Follow(recorder, x.device, shapes_only=shapes_only))
        call_denoiser(model, x, t, conditioning)


def _tensors(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a result, in order."""
    return tuple(_leaves(value))


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
