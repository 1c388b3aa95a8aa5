"""What each Triton kernel compiles to, without a GPU: registers, spills and shared memory for every target.

python -m benchmarks.static            a table
python -m benchmarks.static --json     the same for programs
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hdpo_kernels.rows import triton as rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_STATS = {"logits_stride": "i64", "labels_ptr": "*i64", "bias_ptr": "*{t}", "max_ptr": "*fp32",
          "log_total_ptr": "*fp32", "V": "i32", "softcap": "fp32", "logit_scale": "fp32"}  # fmt: skip
# kernel -> signature, {t} standing for the inputs' dtype; flags that are constexpr come from FLAGS
KERNELS = {
    rows._row_stats_kernel: {"logits_ptr": "*fp32", "logp_ptr": "*fp32", "entropy_ptr": "*fp32", **_STATS},
    rows._row_grad_kernel: {"logits_ptr": "*fp32", "grad_ptr": "*{t}", "grad_stride": "i64", **_STATS},
    rows._sequence_sum_kernel: {"values_ptr": "*fp32", "cu_seqlens_ptr": "*i64", "sums_ptr": "*fp32"},
}
DTYPES = ("bf16", "fp16", "fp32")
FLAGS = ({"HAS_BIAS": False, "HAS_SOFTCAP": False}, {"HAS_BIAS": True, "HAS_SOFTCAP": True})


class Resources(NamedTuple):
    kernel: str
    target: str
    variant: str
    registers: int
    spills: int  # registers spilled (AMD), bytes of local memory (NVIDIA)
    shared_bytes: int


def measure() -> list[Resources]:
    """Compile every kernel for every target; raises what the compiler raises."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels by Python functions; unset it to compile them")
    results = []
    for kernel, types in KERNELS.items():
        per_row = "HAS_BIAS" in kernel.arg_names
        for dtype in DTYPES if per_row else DTYPES[:1]:
            for flags in FLAGS if per_row else ({},):
                constants = {**flags, "BLOCK_V": rows.BLOCK_V} if per_row else {"BLOCK_N": rows.BLOCK_N}
                signature = {n: types[n].format(t=dtype) if n in types else "constexpr" for n in kernel.arg_names}
                for name, target in TARGETS.items():
                    options = {"num_warps": rows.NUM_WARPS} if per_row else {}
                    source = ASTSource(
                        kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}
                    )
                    compiled = triton.compile(source, target=target, options=options)
                    variant = dtype + ("+bias+softcap" if flags.get("HAS_BIAS") else "")
                    results.append(Resources(kernel.__name__, name, variant, *_resources(compiled, target)))
    return results


def _resources(compiled, target: GPUTarget) -> tuple[int, int, int]:
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        (registers,) = map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text))
        return registers, sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)), shared
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, one object per kernel, target and variant")
    results = measure()
    if parser.parse_args().json:
        print(json.dumps([r._asdict() for r in results]))
        return
    print(f"{'kernel':24}{'target':10}{'variant':20}{'registers':>10}{'spills':>8}{'shared':>8}")
    for r in results:
        print(f"{r.kernel:24}{r.target:10}{r.variant:20}{r.registers:>10}{r.spills:>8}{r.shared_bytes:>8}")


if __name__ == "__main__":
    main()
