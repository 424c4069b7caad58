"""Every kernel test runs on whatever is here: a GPU if there is one, else Triton's interpreter on the CPU.

The interpreter is chosen by an environment variable that triton reads when it is imported; tests/conftest.py sets it,
as the first file of a test run. With a GPU the same tests compile and run the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def device() -> str:
    """Where Triton runs here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the package allocates with NaN or 0x5A, so that an element that no kernel writes fails loudly."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return tensor.fill_(float("nan"))
        tensor.view(torch.uint8).fill_(0x5A)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
