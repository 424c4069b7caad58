"""What `make demo` runs: the shipped model through a shipped recipe, as anyone would type it.

Home is `.quantmill` in the checkout unless QUANTMILL_HOME says otherwise. Running it again computes nothing: the result
of every task is known.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from orchestrator.cli.main import run_cli

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "qdiffusion-w4a8"
MODEL = Path("examples/models/emoji32")


def main() -> int:
    """Run the demo; return its exit code."""
    os.chdir(ROOT)
    home = [] if os.environ.get("QUANTMILL_HOME") else ["--home", ".quantmill"]
    return run_cli([*home, "run", RECIPE, "--model", str(MODEL)])


if __name__ == "__main__":
    sys.exit(main())
