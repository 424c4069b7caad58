"""Kernels compiled for GPUs that are not here, in a process of its own: this one's triton is an interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from kernels.compile_report import (
    ARCHITECTURES,
    OWN_LOOP,
    OWN_SPILL_LIMIT,
    SPILL_LIMIT,
    Loop,
    Usage,
    grown,
    main,
    main_loop,
    problems,
    table,
)

# A few kernels of each kind where registers are scarcest.
QUICK = [
    ("sm_90", "linear W8A8, 128"),
    ("sm_90", "conv 3x3/1 W4A8 g64"),
    ("gfx942", "linear W4A8, 128 x 128"),
    ("sm_100", "conv 3x3/1 W4A8, 128 x 32, of mixed bits"),
    ("sm_90", "linear of 2, 4 and 8 bits, 128"),
    ("sm_80", "scaled channels"),
    ("sm_90", "linear W4A8 g64 of integers, 160 x 128, own loop"),
]


def compiled(*arguments: str) -> tuple[list[dict[str, Any]], str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "kernels.compile_report", "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout), done.stderr


def check(rows: list[dict[str, Any]], messages: str) -> None:
    """Nothing over a limit, and matrix instructions wherever matrices are multiplied."""
    assert rows
    assert "wanted at most" not in messages
    for row in rows:
        assert row["spilled"] <= (OWN_SPILL_LIMIT if row["kernel"].endswith(OWN_LOOP) else SPILL_LIMIT), row
        assert 0 < row["registers"] <= 512, row
        if row["kernel"].startswith(("linear", "conv")):
            assert row["matrix"] != "none", row


#: Prints a list of what the command prints for each pair of arguments: one process, as importing takes longest.
SEVERAL = """
import contextlib, io, json, sys
from kernels.compile_report import main
printed = []
for arch, only in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["--json", "--arch", arch, "--only", only, "--check", "docs/kernels.md"])
    printed.append((code, json.loads(out.getvalue()), err.getvalue()))
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def quick() -> dict[tuple[str, str], tuple[int, list[dict[str, Any]], str]]:
    """Of each of the few: the command's status, its table, what it said."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SEVERAL, json.dumps(QUICK)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {pair: tuple(each) for pair, each in zip(QUICK, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize(("arch", "only"), QUICK)
def test_kernels_compile_without_spills(
    quick: dict[tuple[str, str], tuple[int, list[dict[str, Any]], str]], arch: str, only: str
) -> None:
    code, rows, messages = quick[arch, only]
    assert code in (0, 1)
    check(rows, messages)
    assert rows[0]["arch"] == arch
    assert "wanted --write" not in messages
    assert "a turn of" not in messages, "more than docs/kernels.md says"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_without_spills(arch: str) -> None:
    rows, messages = compiled("--arch", arch, "--check", "docs/kernels.md")
    check(rows, messages)
    assert "a turn of" not in messages, "more than docs/kernels.md says"
    assert len(rows) >= 40


def test_limits_are_reported() -> None:
    fine, spilled = (Usage("linear", "sm_90", 255, bytes_, 1024, "wgmma.mma_async x 4") for bytes_ in (64, 65))
    greedy = Usage("linear", "gfx942", 128, 0, 64 * 1024 + 1, "v_mfma x 4")
    scalar = Usage("linear", "sm_80", 128, 0, 1024, "none")
    assert problems([fine]) == []
    assert [text.split(": ")[1].split(",")[0] for text in problems([spilled, greedy, scalar])] == [
        "got 65 spilled bytes",
        "got 65537 bytes of shared memory",
        "got no matrix instruction",
    ]
    assert "| linear | sm_90 | 255 | 64 | 1.0 | wgmma.mma_async x 4 |" in table([fine])


# What nvdisasm prints of a loop, and of what is before and after it.
ASSEMBLY = """
.L_x_0:
        /*0f60*/                   IMAD R1, R2, R3, R4 ;
.L_x_5:
        /*1b20*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*1c80*/                   WARPGROUP.ARRIVE ;
        /*1cd0*/                   IGMMA.64x128x32.S8.S8 R88, gdesc[UR24], R88 ;
        /*1e20*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR16], R24, gsb0 ;
        /*1e30*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*1e40*/              @!P0 I2F R7, R8 ;
        /*1e50*/                   I2F.RP R10, R11 ;
        /*1e60*/                   STS [R1], R2 ;
        /*25e0*/               @P0 BRA `(.L_x_5) ;
        /*3f20*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*7360*/              @!P0 BRA `(.L_x_0) ;
"""


def test_a_loop_is_counted() -> None:
    loop = main_loop(ASSEMBLY)
    assert loop == Loop(products=2, in_flight=1, stores=1, conversions=1, barriers=1, others=4)
    assert main_loop(ASSEMBLY.replace("IGMMA", "IMAD")) is None


def test_what_a_branch_skips_and_products_from_registers_are_counted_apart() -> None:
    skips = ASSEMBLY.replace("I2F R7, R8 ;", "BRA `(.L_x_6) ;").replace("        /*1e60*/", ".L_x_6:\n        /*1e60*/")
    from_registers = skips.replace("IGMMA.64x128x32.S8.S8 R88, gdesc", "IGMMA.64x128x32.S8.S8 R88, R4, gdesc")
    loop = main_loop(from_registers)
    assert loop == Loop(2, in_flight=1, stores=1, conversions=0, barriers=1, others=4, seldom=1, from_registers=1)
    assert str(loop).endswith("4 others, 1 seldom, 1 from registers")
    assert Loop.parse(str(loop)) == loop
    assert Loop.parse("") is None


def test_packed_weights_must_be_read_from_registers() -> None:
    fine = Loop(products=8, in_flight=2, stores=0, conversions=12, barriers=5, others=235, from_registers=8)
    shared, stores, waits = (
        replace(fine, **{name: count}) for name, count in (("from_registers", 4), ("stores", 1), ("in_flight", 0))
    )
    kernel = f"linear W4A8 g64 of integers, 128 x 128{OWN_LOOP}"
    rows = [Usage(kernel, "sm_90", 200, 0, 1024, "wgmma.mma_async x 8", each) for each in (fine, shared, stores, waits)]
    assert [text.rsplit("wanted ", 1)[1] for text in problems(rows)] == [
        "all products from registers", "one in flight, nothing stored", "one in flight, nothing stored",
    ]  # fmt: skip
    assert len(grown([replace(rows[0], loop=shared)], table(rows[:1]))) == 1


def test_a_loop_that_waits_or_prepares_operands_is_a_problem() -> None:
    fine = Loop(products=4, in_flight=1, stores=0, conversions=0, barriers=4, others=150)
    waits = Loop(products=4, in_flight=0, stores=0, conversions=0, barriers=4, others=150)
    prepares = Loop(products=4, in_flight=1, stores=8, conversions=0, barriers=4, others=150)
    rows = [
        Usage(f"linear{OWN_LOOP}", "sm_90", 200, 0, 1024, "wgmma.mma_async x 4", loop)
        for loop in (fine, waits, prepares)
    ]
    assert [text.split("got ")[1].split(", ")[1:3] for text in problems(rows)] == [
        ["0 in flight", "0 stores"],
        ["1 in flight", "8 stores"],
    ]


def test_a_kernel_that_takes_more_than_the_table_says_is_reported() -> None:
    loop = Loop(products=4, in_flight=1, stores=0, conversions=8, barriers=4, others=150)
    fine = Usage("linear", "sm_90", 200, 8, 1024, "wgmma.mma_async x 4", loop)
    kept = table([fine, replace(fine, arch="sm_80", loop=None)])
    slower = [
        replace(loop, **{name: count})
        for name, count in {"in_flight": 0, "stores": 1, "conversions": 9, "barriers": 5, "others": 166}.items()
    ]
    assert grown([fine, replace(fine, registers=255, loop=replace(loop, others=160))], kept) == []
    worse = [replace(fine, spilled=16), replace(fine, loop=None), *(replace(fine, loop=each) for each in slower)]
    assert len(grown(worse, kept)) == len(worse)
    assert grown([replace(fine, spilled=16)], kept) == [
        f"linear on sm_90: got 16 spilled bytes, a turn of {loop}, wanted at most 8, {loop}"
    ]
    assert grown([replace(fine, kernel="conv")], kept) == [
        "conv on sm_90: got a kernel that the table lacks, wanted --write"
    ]


def test_an_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "TRITON_INTERPRET: got an interpreter" in capsys.readouterr().err


def test_rows_of_kernels_that_were_not_compiled_stay_while_these_exist() -> None:
    def usage(kernel: str, arch: str, registers: int) -> Usage:
        return Usage(kernel, arch, registers, 0, 1024, "none")

    old = table([usage("sum of splits", "gfx942", 1), usage("sum of splits", "sm_80", 2), usage("gone", "sm_80", 3)])
    drawn = table([usage("sum of splits", "sm_80", 4), usage("range of samples", "sm_80", 5)], old)
    assert [line.split(" | ")[:3] for line in drawn.splitlines()[2:]] == [
        ["| range of samples", "sm_80", "5"],
        ["| sum of splits", "sm_80", "4"],
        ["| sum of splits", "gfx942", "1"],
    ]
    assert table([], drawn) == drawn
