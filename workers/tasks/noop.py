"""Noop: waits, and stores a blob that follows from its parameters and inputs; for benchmarks and recovery drills."""

from __future__ import annotations

import hashlib
import json
import time

from quant_spec.tasks.noop import BLOB, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Wait, and store one blob: the SHA-256 of the payload and of every input's bytes, in the order of their names."""
    if params.seconds:
        time.sleep(params.seconds)
    digest = hashlib.sha256(json.dumps(params.payload, sort_keys=True).encode())
    for _, sources in sorted(inputs.sources.items()):
        for source in sources:
            digest.update(context.store.get_bytes(source))
    count = sum(map(len, inputs.sources.values()))
    return TaskOutput({BLOB: context.store.put_bytes(digest.digest())}, {"inputs": count})
