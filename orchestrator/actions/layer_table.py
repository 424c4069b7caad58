"""How the layers of a release run on the device at hand."""

from __future__ import annotations

from typing import Any

from orchestrator.actions.local import run_task
from orchestrator.actions.lost_bytes import sending_to_repair
from orchestrator.actions.releases import get_release
from orchestrator.service import Service
from quant_spec.enums import KernelBackend
from quant_spec.formats import LayerSpec
from quant_spec.layer_bits import LayerBits
from quant_spec.tasks import layer_table


def release_layers(service: Service, ref: str, *, device: str, backend: KernelBackend) -> dict[str, Any]:
    """Return `release`, `digest`, `device`, `backend` and `layers` of a release, as the task `layers` describes them.

    Each layer also has `bits`, as `LayerBits.to_json` has them: means, where channels or steps differ.

    Parameters
    ----------
    service
        Knows the release and holds its bytes.
    ref
        name@3, name@alias, name, or a digest's beginning.
    device
        Torch's name of the device.
    backend
        As `load_quantized` takes it.
    """
    release = get_release(service, ref)
    with sending_to_repair(service, release):
        metrics = run_task(
            service.settings,
            layer_table.KIND,
            layer_table.Params(backend=backend),
            layer_table.Inputs(artifact=release.digest),
            device=device,
        ).metrics
    layers = [{**each, "bits": LayerBits.of(LayerSpec.from_json(each)).to_json()} for each in metrics["layers"]]
    return {"release": release.ref, "digest": release.digest, **metrics, "layers": layers}
