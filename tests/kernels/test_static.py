"""Every Triton kernel compiles for every target without a GPU, to what the committed table says of it."""

import ast
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hdpo_kernels

PACKAGE = Path(hdpo_kernels.__file__).parent
COMMITTED = PACKAGE.parent / "benchmarks" / "results" / "static.csv"
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # most that a program can have
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("triton")
    # A process of its own: under TRITON_INTERPRET, which this one may have set, there is nothing to compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.static", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kernels_in_source() -> set[str]:
    """Functions under @triton.jit that are launched: those named _…_kernel; the others are inlined into them."""
    return {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def test_kernels_compile_for_every_target(table):
    assert kernels_in_source() and {"_row_stats_kernel", "_row_grad_kernel"} <= kernels_in_source()
    compiled = {(row["kernel"], row["target"]) for row in table}
    assert compiled == {(kernel, target) for kernel in kernels_in_source() for target in SHARED_KIB}


def test_kernels_do_not_spill(table):
    assert [row for row in table if row["spills"]] == []
    assert all(row["registers"] > 0 for row in table)


def test_kernels_fit_the_shared_memory(table):
    assert [row for row in table if row["shared_bytes"] > SHARED_KIB[row["target"]] * 1024] == []


def test_linear_stats_kernel_uses_the_matrix_instructions_of_the_target(table):
    rows = [row for row in table if row["kernel"] == "_linear_stats_kernel" and not row["variant"].startswith("fp32")]
    assert {row["variant"][:4] for row in rows} == {"bf16", "fp16"}
    assert [row for row in rows if row["matrix"] != MATRIX[row["target"]]] == []


def test_the_committed_table_is_what_is_compiled_now(table):
    with open(COMMITTED, newline="", encoding="utf-8") as file:
        committed = list(csv.DictReader(file))
    if committed[0]["triton"] != table[0]["triton"]:
        pytest.skip(f"the table is of triton {committed[0]['triton']}, not {table[0]['triton']}")
    now = [{name: str(value) for name, value in row.items()} for row in table]
    assert committed == now, "run python -m benchmarks.static"
