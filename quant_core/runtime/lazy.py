"""Tensors that are not computed yet: what is done to them next may be part of the kernel that computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class LazyTensor(Tensor):
    """A tensor that takes up some operations, and is computed, once, when any other reads it.

    Without values of its own: a subclass makes it with `Tensor._make_wrapper_subclass`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def value(self) -> Tensor:
        """Compute it, as it would have been without this class; once."""
        raise NotImplementedError

    def taking(self, function: Any, other: Any, *, is_first: bool) -> Tensor | None:
        """Return this after an operation of two arguments, of which it is the first or second; None if it takes up no
        such operation."""  # fmt: skip
        raise NotImplementedError

    def goes_with(self, other: Any) -> bool:
        """Whether another argument is a plain tensor of the same dtype and device."""
        return type(other) is Tensor and other.dtype is self.dtype and other.device == self.device

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(args) == 2 and not kwargs:
            for i, one in enumerate(args):
                taken = one.taking(function, args[1 - i], is_first=i == 0) if isinstance(one, LazyTensor) else None
                if taken is not None:
                    return taken
        args, kwargs = pytree.tree_map_only(LazyTensor, lambda each: each.value(), (args, kwargs or {}))
        return function(*args, **kwargs)
