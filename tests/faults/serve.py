"""`quantmill serve` with short leases, so that faults can outlast them: the arguments are the command line's."""

from __future__ import annotations

import sys
from functools import partial
from unittest.mock import patch

from orchestrator.actions import execution
from orchestrator.cli.main import run_cli
from orchestrator.scheduling.scheduler import SchedulerConfig

#: Seconds of a lease.
LEASE_SECONDS = 3.0

if __name__ == "__main__":
    shorter = partial(SchedulerConfig, lease_seconds=LEASE_SECONDS, poll_seconds=0.2)
    with patch.object(execution, "SchedulerConfig", shorter):
        sys.exit(run_cli(sys.argv[1:]))
