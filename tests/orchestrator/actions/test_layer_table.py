"""What `artifacts show --layers` prints."""

from __future__ import annotations

from typing import Any

from orchestrator.cli.artifacts import _layer_table


def layer(name: str, **fields: Any) -> dict[str, Any]:
    weight = {"bits": 4, "granularity": "per_channel", "group_size": None}
    activation = {"bits": 8, "mode": "per_step"}
    plain = {"weight": weight, "activation": activation, "split": None, "bytes": 10, "backend": "cpu", "reason": "so"}
    return {"layer": name} | plain | fields


def test_formats_of_channels_are_told() -> None:
    mixed = {"bits": 3, "granularity": "per_channel", "group_size": None, "mixture": [[1, 2], [3, 4]]}
    layers = [
        layer("plain"),
        layer("mixed", weight=mixed),
        layer("steps", activation={"bits": 8, "mode": "per_step", "step_bits": [4] * 19 + [8]}),
        layer("dmq", split=[3, 4], channel_scale=True, channel_shift=True),
    ]
    text = _layer_table({"release": "a@1", "device": "a CPU", "backend": "cpu", "layers": layers})
    rows = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line.strip()}
    assert rows["plain"] == "plain 4 per_channel 8 per_step 10 B cpu so"
    assert rows["mixed"] == "mixed 2.33 (1:33% 3:67%) per_channel 8 per_step 10 B cpu so"
    assert rows["steps"] == "steps 4 per_channel 4.2 (4:95% 8:5%) per_step 10 B cpu so"
    assert rows["dmq"] == "dmq 4 per_channel in 2 parts 8 per_step, scaled and shifted channels 10 B cpu so"
