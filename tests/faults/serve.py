"""`quantmill serve` with short leases, so that faults can outlast them: the arguments are the command line's."""

from __future__ import annotations

import sys
from functools import partial

import orchestrator.actions.execution as execution
from orchestrator.cli.main import run_cli

#: Seconds of a lease.
LEASE_SECONDS = 3.0

if __name__ == "__main__":
    shorter = partial(execution.SchedulerConfig, lease_seconds=LEASE_SECONDS, poll_seconds=0.2)
    execution.SchedulerConfig = shorter
    sys.exit(run_cli(sys.argv[1:]))
