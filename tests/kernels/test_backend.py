from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kernels.backend import BackendUnavailableError, backend_for, resolve_backend
from kernels.errors import KernelError
from quant_spec.enums import KernelBackend


def test_auto_takes_the_fastest_that_a_device_has() -> None:
    assert resolve_backend("auto", torch.device("cpu")) is KernelBackend.CPU
    assert resolve_backend("auto", torch.device("cuda", 0)) is KernelBackend.TRITON
    assert resolve_backend("auto", torch.device("mps")) is KernelBackend.REFERENCE


@pytest.mark.parametrize(("backend", "device"), [("reference", "cuda"), ("cpu", "cpu"), ("triton", "cuda")])
def test_a_choice_is_taken(backend: str, device: str) -> None:
    assert resolve_backend(backend, torch.device(device)) is KernelBackend(backend)


def test_the_integer_cpu_backend_runs_on_a_cpu_only() -> None:
    with pytest.raises(BackendUnavailableError, match="got 'cpu' on device cuda:1, wanted device cpu") as caught:
        resolve_backend("cpu", torch.device("cuda", 1))
    assert caught.value.exit_code == 2


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(KernelError, match="got 'cuda', wanted one of auto, reference, triton, cpu") as caught:
        resolve_backend("cuda", torch.device("cpu"))
    assert not isinstance(caught.value, BackendUnavailableError)


def test_operators_take_the_reference_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert backend_for(cpu) is KernelBackend.REFERENCE
    assert backend_for(cpu, "reference") is KernelBackend.REFERENCE
    with pytest.raises(KernelError, match="got 'cpu' for an operator of tensors"):
        backend_for(cpu, "cpu")
    with pytest.raises(KernelError, match="got 'cuda', wanted one of"):
        backend_for(cpu, "cuda")


def test_triton_runs_here_only_interpreted() -> None:
    code = (
        "import torch; from kernels.backend import *\n"
        "print(backend_for(torch.device('cuda')))\n"
        "for choose in (backend_for, lambda device, backend: resolve_backend(backend, device)):\n"
        "    try: choose(torch.device('cpu'), 'triton')\n"
        "    except BackendUnavailableError as error: print(error)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "triton",
        *["backend: got 'triton' on device cpu, wanted a GPU, auto or reference"] * 2,
    ]


def test_without_triton_everything_but_its_kernels_works() -> None:
    """A finder that hides triton stands for a machine that does not have it."""
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'triton' else found(name, package)\n"
        "import torch, kernels.gemm, kernels.conv, kernels.norms, kernels.fp8, kernels.cpu\n"
        "from kernels.backend import BackendUnavailableError, backend_for\n"
        "x = kernels.fp8.quantize_fp8(torch.ones(2, 3))\n"
        "print(x.scale.shape, backend_for(torch.device('cuda')))\n"
        "try: kernels.fp8.quantize_fp8(torch.ones(2, 3), 'triton')\n"
        "except BackendUnavailableError as error: print(error)\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "torch.Size([2]) reference",
        "backend: got 'triton', which is not installed; wanted auto or reference",
        "False",
    ]
