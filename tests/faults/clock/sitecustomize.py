"""Python reads this when it starts, if its folder is in PYTHONPATH: the process's clock is off by some seconds."""

import os
import time

_shift = float(os.environ.get("FAULTS_CLOCK_SECONDS", "0"))
if _shift:
    _time, _time_ns = time.time, time.time_ns
    time.time = lambda: _time() + _shift
    time.time_ns = lambda: _time_ns() + int(_shift * 1e9)
