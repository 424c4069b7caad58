from __future__ import annotations

import pytest

from kernels.backend import AVAILABLE_BACKENDS, BackendUnavailableError, KernelBackend, resolve_backend
from kernels.errors import KernelError


@pytest.mark.parametrize("backend", ["auto", "reference", KernelBackend.AUTO, KernelBackend.REFERENCE])
def test_available_backends_resolve(backend: str) -> None:
    resolved = resolve_backend(backend)
    assert resolved is KernelBackend.REFERENCE
    assert resolved in AVAILABLE_BACKENDS


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_absent_backends_name_what_is_available(backend: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"got '{backend}'.*wanted auto or reference") as caught:
        resolve_backend(backend)
    assert caught.value.exit_code == 2


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(KernelError, match="got 'cuda', wanted one of auto, reference, triton, cpu") as caught:
        resolve_backend("cuda")
    assert not isinstance(caught.value, BackendUnavailableError)
