"""Card: a release with what `bench` measured of it in its model card and in bench.json; all else is the same bytes.

Metrics: `artifact_bytes`, the size of all files.
"""

from __future__ import annotations

import json

from quant_core.artifact.card import add_speed
from quant_spec.tasks.card import ARTIFACT, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import put_manifest, read_files
from workers.tasks.release import CARD_FILE

BENCH_FILE = "bench.json"


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Write card and figures anew."""
    store, bench = context.store, params.bench
    files = read_files(store, inputs.artifact)
    card = add_speed(store.get_bytes(files[CARD_FILE][0]).decode(), bench)
    for path, text in {CARD_FILE: card, BENCH_FILE: json.dumps(bench, indent=2, sort_keys=True) + "\n"}.items():
        data = text.encode()
        files[path] = (store.put_bytes(data), len(data))
    digest = put_manifest(store, files)
    return TaskOutput({ARTIFACT: digest}, {"artifact_bytes": sum(size for _, size in files.values())})
