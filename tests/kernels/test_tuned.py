from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels._triton import tuned
from kernels._triton.blocks import fp8_blocks, int_blocks
from kernels._triton.tuned import CONV_INT8, HOPPER, LINEAR_INT8, POINTERS, Chip, Entry, Shape, Tile, nearest
from kernels.weights import WeightLayout

WIDE, TALL, SMALL = (Tile(POINTERS, m, n, 128, 8, 3) for m, n in ((128, 256), (256, 128), (64, 64)))
ENTRIES = (
    Entry(LINEAR_INT8, Shape(8192, 10240, 1280), WIDE),
    Entry(LINEAR_INT8, Shape(256, 1152, 1152), SMALL),
    Entry(CONV_INT8, Shape(32768, 640, 640, 9), TALL),
)


def test_a_shape_takes_the_nearest_one_that_was_measured() -> None:
    assert nearest(ENTRIES, LINEAR_INT8, Shape(4096, 5120, 1280)) is WIDE
    assert nearest(ENTRIES, LINEAR_INT8, Shape(512, 1152, 4608)) is SMALL
    assert nearest(ENTRIES, CONV_INT8, Shape(8192, 1280, 1280, 9)) is TALL


def test_one_that_is_far_or_another_operator_takes_none() -> None:
    assert nearest(ENTRIES, LINEAR_INT8, Shape(1, 64, 64)) is None
    assert nearest(ENTRIES, CONV_INT8, Shape(32768, 640, 640, 1)) is None
    assert nearest(ENTRIES, "linear_fp8", Shape(8192, 10240, 1280)) is None


H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), 132)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables with that of one device."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    written = tuned.document(H100, {"triton": "3.6.0"}, [tuned.row_of(entry, us=1.0) for entry in ENTRIES])
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(written))
    tuned.entries_of.cache_clear()
    yield tmp_path
    tuned.entries_of.cache_clear()


def test_a_devices_file_is_read(folder: Path) -> None:
    assert tuned.file_of(H100.name).parent == folder
    assert tuned.entries_of(H100) == ENTRIES


def test_a_device_without_one_takes_that_of_the_same_processor(folder: Path) -> None:
    assert tuned.entries_of(Chip("NVIDIA H200", (9, 0), 132)) == ENTRIES
    assert tuned.entries_of(Chip("NVIDIA H100 PCIe", (9, 0), 114)) == ()
    assert tuned.entries_of(Chip("NVIDIA B200", (10, 0), 132)) == ()


def test_every_shipped_file_can_be_read() -> None:
    paths = list(tuned.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        table = json.loads(path.read_text())
        assert tuned.file_of(table["device"]) == path
        assert tuned.entries_of(Chip(table["device"], tuple(table["capability"]), table["processors"]))


def test_a_tile_counts_for_8_bits_with_a_plain_epilogue() -> None:
    eight, four = (WeightLayout(bits, 640, 1, 32, 0, True) for bits in (8, 4))
    assert (int_blocks("sm_90", 8192, 2560, eight, tile=WIDE).m, fp8_blocks("sm_90", 8, 8, tile=WIDE).n) == (128, 256)
    usual = int_blocks("sm_90", 8192, 2560, eight, heavy=True)
    assert int_blocks("sm_90", 8192, 2560, eight, heavy=True, tile=TALL) == usual
    assert int_blocks("sm_90", 8192, 2560, four, tile=TALL) == int_blocks("sm_90", 8192, 2560, four)
    # What Hopper's own loop does not take runs as if nothing had been measured.
    own = Tile(HOPPER, 256, 256, 64, 8, 3)
    assert int_blocks("sm_90", 8192, 2560, eight, tile=own) == int_blocks("sm_90", 8192, 2560, eight)


def test_operands_that_tma_cannot_copy_are_left_to_the_other_kernel() -> None:
    from kernels._triton.hopper_launch import takes
    from kernels.epilogue import EpilogueRows

    none = EpilogueRows(None, None, None, None)
    x, weight = (torch.zeros(64, 64, dtype=torch.int8) for _ in range(2))
    assert takes(x, weight, none, 64, torch.bfloat16)
    assert not takes(x, weight, none, 64, torch.float32)  # outputs of two bytes alone
    assert not takes(x, weight, none, 60, torch.bfloat16)  # a row of 120 bytes
    assert not takes(x[:, 8:], weight, none, 64, torch.bfloat16)  # an address that is no multiple of 16
    assert not takes(x[:, :40].contiguous(), weight, none, 64, torch.bfloat16)
    rank = torch.zeros(64, 4)
    assert not takes(x, weight, EpilogueRows(None, None, rank, rank), 64, torch.bfloat16)


@pytest.mark.parametrize(
    ("pixels", "height", "width", "wanted"),
    [
        (128, 64, 64, (2, 64)),
        (128, 32, 32, (4, 32)),
        (128, 128, 128, (1, 128)),
        (256, 16, 16, (16, 16)),
        (64, 96, 96, (2, 32)),
    ],
)
def test_a_rectangle_of_pixels_covers_an_image_with_least_to_spare(
    pixels: int, height: int, width: int, wanted: tuple[int, int]
) -> None:
    from kernels._triton.hopper_launch import rectangle

    assert rectangle(pixels, height, width) == wanted
