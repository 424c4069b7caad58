"""`noop`: waits, and stores a blob that follows from its parameters and inputs; for benchmarks and recovery drills."""

from __future__ import annotations

import hashlib
import json
import time

from workers.execution.context import Inputs, Params, TaskContext, TaskOutput


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Wait `params["seconds"]` and store one blob, named `blob`.

    Its bytes are the SHA-256 of `params["payload"]` and of every input's bytes, in the order of the inputs' names.
    """
    time.sleep(float(params.get("seconds", 0.0)))
    digest = hashlib.sha256(json.dumps(params.get("payload"), sort_keys=True).encode())
    for name in sorted(inputs):
        for item in inputs[name]:
            digest.update(context.store.get_bytes(item))
    return TaskOutput({"blob": context.store.put_bytes(digest.digest())}, {"inputs": sum(map(len, inputs.values()))})
