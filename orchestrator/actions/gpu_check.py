"""Is there a GPU that tasks can use? Looked at in another process, as the orchestrator never sees torch."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.actions.probe import run_python
from quant_spec.enums import Device
from quant_spec.errors import InvalidInputError
from quant_spec.numbers import human_bytes
from quant_spec.recipe import Recipe
from workers.execution.cluster import LOGICAL_GPU_GIB

_SECONDS = 180
_NVIDIA_SMI = "nvidia-smi"
#: Device files: where CUDA works there is at least one of them, even without nvidia-smi.
_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
#: Of an AMD GPU, which torch calls cuda too.
_AMD_DEVICE = "/dev/kfd"

# A Triton kernel is compiled, which takes longest, and must give the reference's integers; sizes have tails.
_PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "kernel": "", "peers": [0, 0]}
if torch.cuda.is_available():
    count = torch.cuda.device_count()
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        found["gpus"].append({"name": torch.cuda.get_device_name(number), "free": free, "total": total})
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    found["peers"] = [sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs), len(pairs)]
    try:
        from kernels.activations import ActivationTable, quantize_by_table
        x = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).cuda()
        table = ActivationTable(torch.tensor([0.02]).cuda(), torch.tensor([128.0]).cuda(), 8)
        codes = [quantize_by_table(x, table, None, backend).codes for backend in ("triton", "reference")]
        found["kernel"] = "" if torch.equal(*codes) else "a Triton kernel gave other integers than its reference"
    except Exception as error:
        found["kernel"] = f"a Triton kernel failed: {type(error).__name__}: {error}"
print(json.dumps(found))
"""


def require_gpu(recipe: Recipe, ray_address: str | None, environ: Mapping[str, str]) -> None:
    """Refuse a recipe that must have a GPU where the only Ray that will execute it is that of this machine, with none.

    Raises
    ------
    InvalidInputError
        If it waited for ever otherwise.
    """
    if recipe.resources.device is not Device.CUDA or ray_address not in (None, "local") or environ.get(LOGICAL_GPU_GIB):
        return
    if shutil.which(_NVIDIA_SMI) is None and not any(Path(each).exists() for each in (*_DEVICES, _AMD_DEVICE)):
        raise InvalidInputError(
            "resources.device: got cuda, but this machine has no GPU driver; wanted auto or cpu, or a cluster by --ray"
        )


def check_gpu() -> tuple[bool, str]:
    """Look at the driver, torch's CUDA, a Triton kernel beside its reference, memory, and how GPUs reach each other.

    Returns
    -------
    (bool, str)
        A machine without a GPU is fit: its tasks run on CPUs. One whose driver has a GPU that torch cannot use is not.
    """
    driver = _driver()
    if driver is None and not any(Path(each).exists() for each in _DEVICES):
        return True, "no GPU: no driver; tasks run on CPUs"
    try:
        run = run_python(_PROBE, _SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"got no answer from torch about its GPUs for {_SECONDS} s, wanted one"
    try:
        found = json.loads(run.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return False, (run.stderr.strip().splitlines() or ["torch cannot be imported"])[-1]
    return judge(driver, found)


def judge(driver: str | None, found: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether what was found will do, and a line about it.

    Parameters
    ----------
    driver
        "version, number of GPUs" of the driver; None if there is none.
    found
        What the probe printed.
    """
    build = f"torch {found['torch']} for " + (f"CUDA {found['cuda']}" if found["cuda"] else "CPUs alone")
    gpus = found["gpus"]
    if not gpus and driver is None:
        return True, f"no GPU: no driver, {build}; tasks run on CPUs"
    if not gpus:
        return False, f"driver {driver}: got {build}, which sees none of them, wanted a CUDA build that does"
    if found["kernel"]:
        return False, found["kernel"]
    names = ", ".join(f"{gpu['name']} {human_bytes(gpu['free'])} of {human_bytes(gpu['total'])} free" for gpu in gpus)
    reached, pairs = found["peers"]
    peers = f"; {reached} of {pairs} pairs have peer access" if pairs else ""
    links = _links() if pairs else ""
    return (
        True,
        f"driver {driver or 'unknown'}, {build}; {names}{peers}{links}; a Triton kernel agrees with its reference",
    )


def _driver() -> str | None:
    """Return the driver's version and how many GPUs it has; None without one."""
    said = _ask("--query-gpu=driver_version", "--format=csv,noheader")
    versions = [line.strip() for line in (said or "").splitlines() if line.strip()]
    return f"{versions[0]} with {len(versions)} GPUs" if versions else None


def _links() -> str:
    """Say how many NVLinks are active."""
    said = _ask("nvlink", "--status") or ""
    return f", {said.count('GB/s')} NVLinks active" if "Link" in said else ", no NVLink"


def _ask(*words: str) -> str | None:
    """Ask the driver's tool; None if it is not there, or fails."""
    tool = shutil.which(_NVIDIA_SMI)
    if tool is None:
        return None
    try:
        run = subprocess.run([tool, *words], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None
