"""Every Triton kernel compiles for every target without a GPU and spills no register."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hdpo_kernels

PACKAGE = Path(hdpo_kernels.__file__).parent
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}


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
    assert compiled == {(kernel, target) for kernel in kernels_in_source() for target in TARGETS}


def test_kernels_do_not_spill(table):
    assert [row for row in table if row["spills"]] == []
    assert all(row["registers"] > 0 for row in table)
