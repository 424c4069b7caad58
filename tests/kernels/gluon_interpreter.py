"""Run `kernels._triton.hopper` without a GPU: its source on a stand-in for Gluon, of tensors in memory.

Triton's interpreter knows no Gluon. What may happen at any time happens here when it does most harm: a buffer that is
copied to holds garbage from the start of the copy until its barrier was waited for, a product reads its operands when
it is waited for, a tile's buffer is copied to global memory when that is waited for. Registers and layouts are not
looked at, but for inline assembly, which is run word by word.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "int1": torch.bool, "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float8e4nv": torch.float8_e4m3fn,
}  # fmt: skip


def dtype_of(dtype: Any) -> torch.dtype:
    """Return torch's dtype of one of Gluon's, also of the real one."""
    names = {"i1": "int1", "i8": "int8", "u8": "uint8", "i16": "int16", "i32": "int32", "i64": "int64"}
    names |= {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8e4nv": "float8e4nv"}
    return dtype if isinstance(dtype, torch.dtype) else DTYPES[names.get(str(dtype), str(dtype))]


class Value:
    """A tensor in registers."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    type = SimpleNamespace(layout=None)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def to(self, dtype: Any) -> Value:
        return Value(self.data.to(dtype_of(dtype)))

    def reshape(self, shape: Sequence[int]) -> Value:
        return Value(self.data.reshape(tuple(shape)))

    def permute(self, order: Sequence[int]) -> Value:
        return Value(self.data.permute(tuple(order)))

    def split(self) -> tuple[Value, Value]:
        return Value(self.data[..., 0]), Value(self.data[..., 1])

    def __getitem__(self, at: Any) -> Value:
        return Value(self.data[at])


def _operator(name: str) -> Callable[[Value, Any], Value]:
    def apply(self: Value, other: Any) -> Value:
        return Value(getattr(self.data, name)(other.data if isinstance(other, Value) else other))

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "and", "or", "lt", "gt", "ge"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))


@dataclass(frozen=True)
class Pointer:
    """Elements of a tensor in global memory."""

    memory: Tensor
    at: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, more + self.at)


class Shared:
    """A buffer in shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, at: int) -> Shared:
        return Shared(self.data[at])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(tuple(order)))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(tuple(shape)))

    def reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        assert self.data.dtype is dtype_of(dtype)
        return Shared(self.data.view(tuple(shape)))

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        assert self.data.dtype is value.data.dtype
        self.data.copy_(value.data)


class Descriptor:
    """A TMA descriptor: blocks of a tensor, with zeros beyond it."""

    def __init__(self, made: Any) -> None:
        self.tensor, block = made.base, list(made.block_shape)
        self.dtype, self.layout = self.tensor.dtype, made.layout
        size = self.tensor.element_size()
        assert all(stride * size % 16 == 0 for stride in self.tensor.stride()[:-1])
        assert self.tensor.stride(-1) == 1
        assert max(block) <= 256
        self.block_type = SimpleNamespace(shape=block, nbytes=torch.Size(block).numel() * size)

    def places(self, at: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return slices of a block that lie within the tensor, and of the tensor."""
        inner, outer = [], []
        for first, length, size in zip(at, self.block_type.shape, self.tensor.shape, strict=True):
            low, high = min(max(first, 0), size), max(min(first + length, size), 0)
            inner.append(slice(low - first, max(high, low) - first))
            outer.append(slice(low, max(high, low)))
        return tuple(inner), tuple(outer)


@dataclass
class Program:
    """What a program waits for."""

    number: int
    programs: int
    warps: int
    copies: dict[int, list[tuple[int, Callable[[], None]]]] = field(default_factory=dict)
    expected: dict[int, int] = field(default_factory=dict)
    phases: dict[int, int] = field(default_factory=dict)
    products: list[Callable[[], None]] = field(default_factory=list)
    stores: list[Callable[[], None]] = field(default_factory=list)


class Language:
    """Gluon's names that `kernels._triton.hopper` uses."""

    def __init__(self) -> None:
        self.program = Program(0, 1, 4)
        for name, dtype in DTYPES.items():
            setattr(self, name, dtype)

    shared_memory_descriptor = Shared
    static_range = staticmethod(range)
    minimum, maximum = staticmethod(min), staticmethod(max)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_, **__: None
        raise AttributeError(name)

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def static_assert(holds: bool, message: str) -> None:
        assert holds, message

    def program_id(self, axis: int) -> int:
        return self.program.number

    def num_programs(self, axis: int) -> int:
        return self.program.programs

    def num_warps(self) -> int:
        return self.program.warps

    @staticmethod
    def arange(start: int, end: int, layout: Any) -> Value:
        return Value(torch.arange(start, end, dtype=torch.int32))

    @staticmethod
    def zeros(shape: Sequence[int], dtype: Any, layout: Any) -> Value:
        return Value(torch.zeros(tuple(shape), dtype=dtype_of(dtype)))

    @staticmethod
    def zeros_like(value: Value) -> Value:
        return Value(torch.zeros_like(value.data))

    @staticmethod
    def where(condition: Value, a: Value, b: int) -> Value:
        return Value(torch.where(condition.data, a.data, torch.tensor(b, dtype=a.data.dtype)))

    @staticmethod
    def max(value: Value, axis: int) -> int:
        return int(value.data.max())

    @staticmethod
    def fma(a: Value, b: Value, c: Value) -> Value:
        return Value((a.data.double() * b.data.double() + c.data.double()).float())

    @staticmethod
    def permute(value: Value, order: Sequence[int]) -> Value:
        return value.permute(order)

    @staticmethod
    def convert_layout(value: Value, layout: Any) -> Value:
        return value

    @staticmethod
    def load(pointer: Pointer, mask: Value, other: float) -> Value:
        at, mask_ = torch.broadcast_tensors(pointer.at.data.long(), mask.data)
        flat = pointer.memory.as_strided(
            (pointer.memory.untyped_storage().nbytes() // pointer.memory.element_size(),), (1,), 0
        )
        found = flat[torch.where(mask_, at + pointer.memory.storage_offset(), 0)]
        return Value(torch.where(mask_, found, torch.tensor(other).to(found.dtype)))

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        buffer = torch.empty(tuple(shape), dtype=dtype_of(dtype))
        buffer.view(torch.uint8).fill_(0x5A)
        return Shared(buffer)

    @staticmethod
    def inline_asm_elementwise(
        asm: str, constraints: str, args: Sequence[Value], dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        return run_asm(asm, args, [dtype_of(each) for each in dtype], pack)


def run_asm(asm: str, args: Sequence[Value], dtypes: Sequence[torch.dtype], pack: int) -> tuple[Value, ...]:
    """Run PTX on 32-bit words of `pack` elements of the last dimension."""
    shape = args[0].shape
    registers: dict[str, Tensor] = {}
    per_output = [max(1, pack * dtype.itemsize // 4) for dtype in dtypes]
    for value in args:
        data = value.data.expand(shape).reshape(-1, pack).contiguous()
        for word in data.view(torch.uint8).view(torch.int32).unbind(1):
            registers[f"${len(registers) + sum(per_output)}"] = word.long() & 0xFFFFFFFF

    def read(name: str) -> Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    def byte(operands: Sequence[Tensor], place: int) -> Tensor:
        a, b, at = operands
        chosen = (at >> (4 * place)) & 0xF
        assert bool((chosen < 8).all())
        return ((a | (b << 32)) >> (8 * chosen)) & 0xFF

    for line in re.findall(r"^\s*([a-z]+\.[\w.]+ .*?);", asm, re.MULTILINE):
        operation, rest = line.split(None, 1)
        target, *names = [name.strip() for name in rest.split(",")]
        operands = [read(name) for name in names]
        match operation:
            case "and.b32":
                result = operands[0] & operands[1]
            case "xor.b32":
                result = operands[0] ^ operands[1]
            case "shr.u32":
                result = operands[0] >> operands[1]
            case "mad.lo.u32":
                result = operands[0] * operands[1] + operands[2]
            case "prmt.b32":
                result = sum((byte(operands, place) << (8 * place) for place in range(4)), torch.tensor(0))
            case _:
                raise NotImplementedError(operation)
        registers[target] = result & 0xFFFFFFFF
    found, first = [], 0
    for dtype, count in zip(dtypes, per_output, strict=True):
        words = torch.stack([registers[f"${first + i}"] for i in range(count)], 1)
        first += count
        signed = torch.where(words >= 2**31, words - 2**32, words).int()
        found.append(Value(signed.view(torch.uint8).view(dtype).reshape(tuple(shape))))
    return tuple(found)


class Hopper:
    """Names of `gluon.language.nvidia.hopper`: barriers, copies and products of the program that runs."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def names(self) -> dict[str, Any]:
        """Return what a module of it has."""
        mbarrier = SimpleNamespace(init=lambda bar, count: None, expect=self.expect, wait=self.wait)
        mbarrier.MBarrierLayout = lambda: None
        tma = SimpleNamespace(async_load=self.load, async_store=self.store, store_wait=self.store_wait)
        return {
            "fence_async_shared": lambda: None,
            "mbarrier": mbarrier,
            "tma": tma,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.multiply_wait,
        }

    @property
    def program(self) -> Program:
        return self.language.program

    def expect(self, bar: Shared, count: int, pred: bool = True) -> None:
        if pred:
            self.program.expected[bar.data.data_ptr()] = count

    def load(self, desc: Descriptor, at: Sequence[int], bar: Shared, target: Shared, pred: bool = True) -> None:
        if not pred:
            return
        assert target.shape == desc.block_type.shape
        target.data.view(torch.uint8).fill_(0x5A)
        inner, outer = desc.places(at)

        def copy() -> None:
            target.data.view(torch.uint8).zero_()
            target.data[inner] = desc.tensor[outer]

        self.program.copies.setdefault(bar.data.data_ptr(), []).append((desc.block_type.nbytes, copy))

    def wait(self, bar: Shared, phase: int) -> None:
        program, key = self.program, bar.data.data_ptr()
        copies = program.copies.pop(key)  # of a barrier that nothing arrives at, a GPU would wait for ever
        assert sum(count for count, _ in copies) == program.expected.pop(key)
        assert program.phases.get(key, 0) == phase
        program.phases[key] = 1 - phase
        for _, copy in copies:
            copy()

    def store(self, desc: Descriptor, at: Sequence[int], source: Shared) -> None:
        assert source.shape == desc.block_type.shape
        inner, outer = desc.places(at)

        def copy() -> None:
            desc.tensor[outer] = source.data[inner]

        self.program.stores.append(copy)

    def store_wait(self, pending: int) -> None:
        while len(self.program.stores) > pending:
            self.program.stores.pop(0)()

    def multiply(self, a: Any, b: Shared, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
        result = Value(acc.data)

        def run() -> None:
            product = (a.data.double() @ b.data.double()).to(result.data.dtype)
            result.data = (acc.data if use_acc else 0) + product

        self.program.products.append(run)
        return result

    def multiply_wait(self, pending: int, accs: Sequence[Value]) -> Any:
        while len(self.program.products) > pending:
            self.program.products.pop(0)()
        return accs[0] if len(accs) == 1 else tuple(accs)


@contextmanager
def _replaced(modules: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Interpreted:
    """`product_kernel`, to be launched as the compiled one is."""

    def __init__(self) -> None:
        self.language = Language()
        experimental, gluon, language, hopper = (ModuleType(name) for name in ("", "gluon", "language", "hopper"))
        gluon.jit = lambda function=None, **_: function if function is not None else (lambda inner: inner)  # type: ignore[attr-defined]
        gluon.language = self.language  # type: ignore[attr-defined]
        experimental.gluon = gluon  # type: ignore[attr-defined]
        vars(hopper).update(Hopper(self.language).names())
        path = Path(__file__).parents[2] / "kernels" / "_triton" / "hopper.py"
        package = "triton.experimental"
        names = (package, *(f"{package}.gluon{part}" for part in ("", ".language", ".language.nvidia.hopper")))
        self.names: dict[str, Any] = {"__name__": "interpreted"}
        with _replaced(dict(zip(names, (experimental, gluon, language, hopper), strict=True))):
            exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), self.names)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: Any, enable_fp_fusion: bool, **constants: Any) -> None:
            given = [self._argument(each) for each in args]
            for number in range(grid[0]):
                self.language.program = Program(number, grid[0], num_warps)
                self.names["product_kernel"](*given, **constants)
                program = self.language.program
                assert not program.copies
                assert not program.products
                assert not program.stores

        return launch

    @staticmethod
    def _argument(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Pointer(value, -0)
        return Descriptor(value) if hasattr(value, "block_shape") else value
