"""Teach diffusers the quantization method "quantmill", so that plain `from_pretrained` loads our folders.

diffusers has no function to register a method: its tables are extended in place, as its other outside methods do. Its
loader casts floating tensors to the requested dtype, ignores surplus tensors and only warns of missing ones; for the
tensors of quantized layers, and for names, this one is strict.
"""

from __future__ import annotations

import warnings
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from kernels.fp8 import FP8
from quant_core.artifact.compact import grid_bits, pack_grids, packed_shape, unpack_grid
from quant_core.artifact.dequantize import dequantize
from quant_core.artifact.folder import parse_quantization_config
from quant_core.artifact.guards import check_layer, guard
from quant_core.errors import ArtifactError, QuantCoreError
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.attention import AttentionQuantizer
from quant_core.nn.feature_table import FeatureTable
from quant_core.nn.layers import QuantLayer, weight_groups
from quant_core.nn.model import build_quantized
from quant_spec.errors import QuantizationError
from quant_spec.quantization_config import FORMAT_VERSION, QUANT_METHOD

_OWN_MODULES = (QuantLayer, ActivationQuantizer, AttentionQuantizer, FeatureTable)


class QuantmillMethod(StrEnum):
    """The method's name; diffusers wants an enum, for its `.value`."""

    QUANTMILL = QUANT_METHOD


class QuantmillConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: which layers are quantized, and how (`quant_spec.formats`)."""

    def __init__(self, version: int = FORMAT_VERSION, quant_method: str = QUANT_METHOD, **model_format: Any) -> None:
        parse_quantization_config({"quant_method": str(quant_method), "version": version, **model_format})
        self.quant_method = QuantmillMethod(quant_method)  # type: ignore[assignment]  # annotated as diffusers' own enum
        self.version = version
        self.__dict__.update(model_format)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able content."""
        return super().to_dict() | {"quant_method": str(self.quant_method)}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`: nothing in it is a default. diffusers' `to_json_string` calls this."""
        return self.to_dict()

    def __repr__(self) -> str:
        model_format = parse_quantization_config(self.to_dict())
        return f"{type(self).__name__}({len(model_format.layers)} layers, {len(model_format.attentions)} attentions)"


class QuantmillQuantizer(DiffusersQuantizer):
    """Builds the quantized layers of a model on the meta device and fills them from the packed file."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantmillConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loaded_keys: list[str] = []
        self._own_names: set[str] = set()
        self._grid_bits: dict[str, int] = {}
        self._dtype = torch.float32

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """Remember the dtype that was asked for."""
        if isinstance(torch_dtype, torch.dtype):
            self._dtype = torch_dtype
        return torch_dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        model_format = parse_quantization_config(self.quantization_config.to_dict())
        try:
            build_quantized(model, model_format)
        except (AttributeError, QuantCoreError, QuantizationError) as error:
            raise ArtifactError(f"quantization_config does not fit {type(model).__name__}: {error}") from error
        for name, module in model.named_modules():
            if isinstance(module, _OWN_MODULES):
                self._own_names |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers()}
        self._grid_bits = grid_bits(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, QuantLayer):
                check_layer(name, module)
            # Not part of the file; on the meta device it was built without values.
            if isinstance(module, QuantLayer) and module.group_index.is_meta:
                module.group_index = weight_groups(module.shape, module.spec).to(module.qweight.device)
        guard(model, self._dtype)
        return model

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the names in the file, for `update_missing_keys`."""
        self._loaded_keys = loaded_keys
        return loaded_keys

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a file whose tensors are not exactly the model's."""
        wanted = set(model.state_dict())
        if missing := sorted(wanted.difference(self._loaded_keys)):
            raise ArtifactError(
                f"packed weights: missing {len(missing)} tensors of the model: {', '.join(missing[:3])}"
            )
        if surplus := sorted(set(self._loaded_keys) - wanted):
            raise ArtifactError(f"packed weights: {len(surplus)} tensors not of the model: {', '.join(surplus[:3])}")
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether a tensor belongs to a quantized layer, so that it is kept as stored."""
        return param_name in self._own_names

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Refuse a tensor of another shape."""
        got, wanted = tuple(loaded_param.shape), tuple(current_param.shape)
        bits = self._grid_bits.get(param_name)
        if got != wanted and (bits is None or got != packed_shape(wanted, bits)):
            raise ArtifactError(f"packed tensor {param_name}: got shape {got}, wanted {wanted}")
        return True

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a tensor of a quantized layer in its place, in the dtype of the file whatever dtype was asked for."""
        owner, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(owner)
        stored, wanted = state_dict[param_name], getattr(module, leaf)
        if leaf != "bias" and stored.dtype != wanted.dtype:
            raise ArtifactError(f"packed tensor {param_name}: got dtype {stored.dtype}, wanted {wanted.dtype}")
        if leaf in ("scale", "channel_scale") and not bool(((stored > 0) & stored.isfinite()).all()):
            raise ArtifactError(f"packed tensor {param_name}: got a scale that is zero, negative or not finite")
        if stored.dtype is FP8 and bool(stored.float().isnan().any()):
            raise ArtifactError(f"packed tensor {param_name}: got NaN among E4M3 numbers")
        if param_name in self._grid_bits:
            stored = unpack_grid(stored, tuple(wanted.shape), self._grid_bits[param_name])
        setattr(module, leaf, stored.to(target_device))

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what `save_pretrained` writes: the tensors as `write_artifact` would, in the version loaded."""
        tensors = dict(state_dict)
        if self.quantization_config.to_dict()["version"] > 1:
            pack_grids(tensors, self._grid_bits)
        return tensors, {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        plain = dequantize(model, dict(model.config))  # type: ignore[arg-type]
        plain.hf_quantizer = self  # type: ignore[assignment]  # the base class deletes it from what this returns
        return plain

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` writes the same packed tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def register() -> None:
    """Add the method to diffusers' tables; doing so again changes nothing."""
    try:
        from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    except ImportError as error:
        warnings.warn(
            f"this diffusers has no tables of quantizers, so from_pretrained can't load ours: {error}", stacklevel=2
        )
        return
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, QuantmillQuantizer)
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, QuantmillConfig)
