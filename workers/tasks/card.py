"""Card: a release with what `bench` measured of it in its model card and in bench.json; all else is the same bytes.

params
    bench: as `quantmill bench --json` prints it
inputs
    artifact: the release's tree
outputs
    artifact: the new tree
metrics
    artifact_bytes: size of all files
"""

from __future__ import annotations

import json

from quant_core.artifact.card import add_speed
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.storage.manifest import put_manifest, read_manifest
from workers.tasks.common import only
from workers.tasks.release import CARD_FILE

BENCH_FILE = "bench.json"


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Write card and figures anew."""
    store, bench = context.store, params["bench"]
    manifest = read_manifest(store, only(inputs, "artifact"))["files"]
    files = {path: (entry["sha256"], entry["bytes"]) for path, entry in manifest.items()}
    card = add_speed(store.get_bytes(files[CARD_FILE][0]).decode(), bench)
    for path, text in {CARD_FILE: card, BENCH_FILE: json.dumps(bench, indent=2, sort_keys=True) + "\n"}.items():
        data = text.encode()
        files[path] = (store.put_bytes(data), len(data))
    digest = put_manifest(store, files)
    return TaskOutput({"artifact": digest}, {"artifact_bytes": sum(size for _, size in files.values())})
