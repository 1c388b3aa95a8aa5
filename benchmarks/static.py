"""What is known without a GPU: what each Triton kernel compiles to, and what each call launches, copies and holds.

python -m benchmarks.static            two tables, also written to benchmarks/results: static.csv and launches.csv
python -m benchmarks.static --json     the first of them for programs, not written
"""

import argparse
import csv
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import calls
from benchmarks.table import RESULTS
from hdpo_kernels import fused
from hdpo_kernels.pairs import triton as pairs
from hdpo_kernels.rows import triton as rows
from hdpo_kernels.sampled import triton as sampled

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLAGS = {
    "": {"HAS_BIAS": False, "HAS_SOFTCAP": False},
    "+softcap": {"HAS_BIAS": False, "HAS_SOFTCAP": True},
    "+bias+softcap": {"HAS_BIAS": True, "HAS_SOFTCAP": True},
}
# Arguments of the kernels by name, {t} standing for the inputs' dtype; other pointers are *fp32, other numbers i32
TYPES = {"hidden_ptr": "*{t}", "weight_ptr": "*{t}", "bias_ptr": "*{t}", "grad_ptr": "*{t}", "out_ptr": "*{t}",
         "labels_ptr": "*i64", "cu_seqlens_ptr": "*i64", "long_ptr": "*i64", "num_long_ptr": "*i64",
         "columns_ptr": "*i32", "counts_ptr": "*i32", "totals_ptr": "*i32", "cursors_ptr": "*i32", "starts_ptr": "*i32",
         "rows_ptr": "*i32", "sorted_rows_ptr": "*i32", "draws_ptr": "*i64", "epsilon": "fp32", "softcap": "fp32",
         "logit_scale": "fp32", "factor": "fp32", "alpha": "fp32", "beta": "fp32", "smoothing": "fp32",
         "nll_weight": "fp32"}  # fmt: skip
MATRIX = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync", "mfma": "v_mfma_"}


class Launch(NamedTuple):
    kernel: Any
    variant: str
    keywords: dict[str, int]  # constexpr arguments and compiler options
    dtype: str = "fp32"


class Resources(NamedTuple):
    kernel: str
    target: str
    variant: str
    registers: int
    spills: int  # registers spilled (AMD), bytes of local memory (NVIDIA)
    shared_bytes: int
    matrix: str  # the matrix instruction in the code, "" for none
    triton: str  # version


def launches(target: GPUTarget) -> Iterator[Launch]:
    """Every kernel as its launcher starts it on the target, for each dtype, with and without bias and softcap."""
    for dtype, torch_dtype in DTYPES.items():
        for name, flags in FLAGS.items():
            row = {**flags, "BLOCK_V": rows.BLOCK_V, "num_warps": rows.NUM_WARPS}
            tile = {**flags, **fused.choose_tiles(torch_dtype, target, flags["HAS_SOFTCAP"])._asdict()}
            yield Launch(rows._row_stats_kernel, dtype + name, row, dtype)
            yield Launch(rows._row_grad_kernel, dtype + name, row, dtype)
            whole = rows.whole_row_tile(rows.longest_whole_row(**flags), target.warp_size)
            yield Launch(rows._whole_row_kernel, dtype + name, {**flags, **whole}, dtype)
            narrow = {"BLOCK_V": rows.SAMPLE_BLOCK_V, "num_warps": rows.SAMPLE_NUM_WARPS}
            yield Launch(rows._row_sample_kernel, dtype + name, {**row, **narrow}, dtype)
            yield Launch(fused._linear_stats_kernel, dtype + name, tile, dtype)
        scale = {"HAS_LABELS": True, "HAS_FACTOR": True, "BLOCK_H": rows.BLOCK_H}
        yield Launch(rows._scale_rows_kernel, dtype, scale, dtype)
        yield Launch(rows._times_kernel, dtype, {"IN_PLACE": dtype == "fp32", "BLOCK": rows.TIMES_BLOCK}, dtype)
        yield from _sampled_launches(dtype)
    for splits in (1, 8, 128):
        yield Launch(fused._merge_stats_kernel, f"{splits} splits", fused.merge_tile(splits))
    for kernel in (rows._sequence_sum_kernel, rows._sequence_spread_kernel):
        yield Launch(kernel, "fp32", {"BLOCK_N": rows.BLOCK_N})
    for name, by_token in (*((name, False) for name in pairs.LOSSES), ("sigmoid", True)):
        flags = {"BY_TOKEN": by_token, "HAS_REF": True, "HAS_GRAD": True}
        keywords = {"LOSS": pairs.LOSSES.index(name), **flags, "BLOCK_N": pairs.BLOCK_N}
        yield Launch(pairs._pair_kernel, f"{name}, by token" if by_token else name, keywords)
    for kernel in (sampled._count_kernel, sampled._place_kernel):
        yield Launch(kernel, "int32", {"BLOCK_B": sampled.BLOCK_B, "num_warps": sampled.NUM_WARPS})


def _sampled_launches(dtype: str) -> Iterator[Launch]:
    """Products of sampled rows with tables of a dtype, and results of the same, at a large and a small hidden size."""
    for hidden_size in (4096, 64):
        tile = sampled.choose_tile(hidden_size, DTYPES[dtype])
        long_tile = sampled.choose_tile(hidden_size, DTYPES[dtype], sampled.LONG_COLUMNS)
        variant = f"{dtype} H={hidden_size}"
        yield Launch(sampled._gather_kernel, variant, tile, dtype)
        yield Launch(sampled._gather_transposed_kernel, variant, {**tile, "LONG": sampled.LONG}, dtype)
        yield Launch(sampled._gather_transposed_long_kernel, variant, long_tile, dtype)
    yield Launch(sampled._bias_kernel, dtype, {"BLOCK_B": sampled.BLOCK_B}, dtype)


def measure() -> list[Resources]:
    """Compile every kernel for every target; raises what the compiler raises."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels by Python functions; unset it to compile them")
    return [
        Resources(
            launch.kernel.__name__,
            name,
            launch.variant,
            *_resources(_compile(launch, target), target),
            triton.__version__,
        )
        for name, target in TARGETS.items()
        for launch in launches(target)
    ]


def _compile(launch: Launch, target: GPUTarget):
    """As a launch does where pointers, strides and sizes that are looked at are multiples of 16, as in real models."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", launch.keywords[name]
            continue
        signature[name] = TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32").format(t=launch.dtype)
        aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if aligned and signature[name] != "fp32":
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.keywords.items() if name not in signature}
    return triton.compile(ASTSource(launch.kernel, signature, constants, attributes), target=target, options=options)


def _resources(compiled, target: GPUTarget) -> tuple[int, int, int, str]:
    shared = compiled.metadata.shared
    assembly = compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]
    matrix = "+".join(name for name, instruction in MATRIX.items() if instruction in assembly)
    if target.backend == "hip":
        (registers,) = map(int, re.findall(r"\.vgpr_count:\s+(\d+)", assembly))
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly))
        return registers, spills, shared, matrix
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], shared, matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, one object per kernel, target and variant")
    as_json = parser.parse_args().json
    results = measure()
    if as_json:
        print(json.dumps([r._asdict() for r in results]))
        return
    _write("static", "{:32}{:8}{:20}{:>10}{:>8}{:>14}  {:10}{:>8}", (Resources._fields, *results))
    _write("launches", "{:44}{:10}{:>11}{:>8}{:>10}{:>10}{:>8}", (calls.Counts._fields, *calls.measure()))


def _write(name: str, line: str, rows: Sequence[Sequence[Any]]) -> None:
    """Print the rows, the first being the header, and put them into results/<name>.csv."""
    with open(RESULTS / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    for row in rows:
        print(line.format(*row))


if __name__ == "__main__":
    main()
