"""What the tasks of a job may run on; it decides no byte of any result, and names no task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from quant_spec.enums import Device
from quant_spec.record import Positive, Record

#: A type of GPU as a cluster's nodes name it, such as H100 or A100-80G.
GpuType = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class JobResources(Record):
    """Where the tasks of a job may run, and for how long; no part of any task's name."""

    device: Device = Field(
        default=Device.AUTO,
        description="Where tasks that gain by a GPU run: auto is on one if the cluster has one that fits.",
    )
    gpu_type: GpuType | None = Field(
        default=None,
        description="Type of GPU, as jobs show and doctor name it; null is any. Without a device, it is cuda.",
    )
    task_minutes: Positive | None = Field(
        default=None,
        description="A task that takes longer is taken away and runs again elsewhere; null is ten times its estimate, "
        "and at least an hour.",
    )

    @model_validator(mode="before")
    @classmethod
    def _on_that_gpu(cls, given: Any) -> Any:
        """Take a type of GPU without a device for what it says: only there."""
        if isinstance(given, Mapping) and given.get("gpu_type") is not None and "device" not in given:
            return {**given, "device": Device.CUDA}
        return given

    @model_validator(mode="after")
    def _type_of_a_gpu(self) -> Self:
        if self.gpu_type is not None and self.device is Device.CPU:
            raise ValueError(f"gpu_type: got {self.gpu_type} with device cpu, wanted null")
        return self
