"""Components: a pipeline's tree with some components in packed form; all other files are the model's own blobs."""

from __future__ import annotations

from quant_spec.tasks.components import PIPELINE, Inputs, Params
from workers.errors import TaskError
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import put_manifest, read_files


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Put packed components in the place of the model's."""
    store = context.store
    if len(params.components) != len(inputs.packed):
        raise TaskError(f"packed: got {len(inputs.packed)} trees, wanted one for each of {len(params.components)}")
    files = read_files(store, inputs.model)
    for name, tree in zip(params.components, inputs.packed, strict=True):
        # generation_config.json and the like stay
        files = {path: entry for path, entry in files.items() if not _is_replaced(path, name)}
        files |= {f"{name}/{path}": entry for path, entry in read_files(store, tree).items()}
    return TaskOutput({PIPELINE: put_manifest(store, files)})


def _is_replaced(path: str, component: str) -> bool:
    """Whether a file holds a component's config or weights, or says which of its files hold them."""
    home, _, name = path.partition("/")
    return home == component and (name == "config.json" or ".safetensors" in name)
