"""Run the command line as `python -m orchestrator.cli`."""

from __future__ import annotations

from orchestrator.cli.main import main

if __name__ == "__main__":
    main()
