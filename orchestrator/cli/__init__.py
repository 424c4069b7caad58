"""The command line, one file for each noun; `python -m orchestrator.cli` is `quantmill`."""
