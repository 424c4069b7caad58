"""Teach transformers the quantization method "quantmill", so that `from_pretrained` loads packed text encoders.

Its tables are those that `transformers.quantizers.auto` offers functions for. Where transformers is not installed there
is nothing to teach.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quant_core.artifact.folder import parse_quantization_config
from quant_core.artifact.guards import check_layer, refuse_adapters, refuse_casts
from quant_core.errors import ArtifactError, QuantCoreError
from quant_core.nn.layers import QuantLayer, quantize_layers
from quant_core.nn.steps import StepClock
from quant_spec.errors import QuantizationError
from quant_spec.quantization_config import FORMAT_VERSION, QUANT_METHOD


class QuantmillTextConfig(QuantizationConfigMixin):
    """`quantization_config` of a text encoder's config.json: which layers are quantized, and how."""

    def __init__(self, version: int = FORMAT_VERSION, quant_method: str = QUANT_METHOD, **model_format: Any) -> None:
        parse_quantization_config({"quant_method": str(quant_method), "version": version, **model_format})
        self.quant_method = quant_method
        self.version = version
        self.__dict__.update(model_format)


class QuantmillTextQuantizer(HfQuantizer):
    """Builds the quantized Linear layers of a model on the meta device, for the packed file to fill."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantmillTextConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._own: set[str] = set()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model_format = parse_quantization_config(self.quantization_config.to_dict())
        if model_format.attentions or any(spec.activation for spec in model_format.layers.values()):
            raise ArtifactError("text encoder: got quantized activations, wanted weights alone")
        try:
            with torch.device("cpu"):  # transformers builds models inside of a meta device
                layers = quantize_layers(model, model_format.layers, StepClock(()))
        except (AttributeError, QuantCoreError, QuantizationError) as error:
            raise ArtifactError(f"quantization_config does not fit {type(model).__name__}: {error}") from error
        self._own = {f"{name}.{leaf}" for name, layer in layers.items() for leaf, _ in layer.named_buffers()}
        self._check_files(model, kwargs.get("checkpoint_files") or [])
        return model

    def _check_files(self, model: nn.Module, files: list[str]) -> None:
        """Refuse files without a tensor of a quantized layer, or with one of another shape or dtype."""
        found: set[str] = set()
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in self._own.intersection(file.keys()):
                    stored, wanted = file.get_tensor(name), model.get_buffer(name)
                    is_same = stored.dtype == wanted.dtype or name.endswith(".bias")
                    if stored.shape != wanted.shape or not is_same:
                        raise ArtifactError(
                            f"packed tensor {name}: got {tuple(stored.shape)} {stored.dtype}, wanted "
                            f"{tuple(wanted.shape)} {wanted.dtype}"
                        )
                    if name.endswith(".scale") and not bool(((stored > 0) & stored.isfinite()).all()):
                        raise ArtifactError(f"packed tensor {name}: got a scale that is zero, negative or not finite")
                    found.add(name)
        if files and (missing := sorted(self._own - found)):
            raise ArtifactError(
                f"packed weights: missing {len(missing)} tensors of the model: {', '.join(missing[:3])}"
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, QuantLayer):
                check_layer(name, module)
                module.group_index = module.group_index.to(module.qweight.device)
        refuse_adapters(model, ("add_adapter", "load_adapter"))
        refuse_casts(model)
        return model

    def get_new_dtype(self, converter: Any, param: Tensor, dtype: Any) -> Any:
        """Leave tensors of quantized layers in the dtype of the file, whatever dtype was asked for."""
        names = getattr(converter, "target_patterns", ())
        if any(name in self._own and not name.endswith(".bias") for name in names):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the same packed tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def register() -> None:
    """Add the method to transformers' tables; doing so again changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(QuantmillTextConfig)
        register_quantizer(QUANT_METHOD)(QuantmillTextQuantizer)
