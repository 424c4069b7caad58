"""Our import root `kernels` shares its name with a Hugging Face package that diffusers and transformers probe for."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

IMPORTS = "from diffusers import UNet2DConditionModel; from transformers import CLIPTextModel"
PROBES = (
    "import diffusers.utils.import_utils as d, transformers.utils.import_utils as t;"
    "assert not d.is_kernels_available(); assert not t.is_kernels_available()"
)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(f"import kernels; import kernels.packing; {IMPORTS}; {PROBES}", id="kernels-first"),
        pytest.param(f"{IMPORTS}; import kernels; {IMPORTS}; {PROBES}", id="kernels-last", marks=pytest.mark.slow),
    ],
)
def test_the_libraries_import_and_do_not_take_ours_for_theirs(script: str) -> None:
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_other_package_is_not_installed() -> None:
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("kernels")


def test_our_root_is_a_docstring_only() -> None:
    script = "import sys, kernels; sys.exit('torch' in sys.modules or hasattr(kernels, '__version__'))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
