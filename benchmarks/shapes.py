"""The problems that are timed, by name."""

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    name: str
    rows: int
    vocab: int
    width: int
    sequences: int
    dtype: torch.dtype


def loss_shapes(device: str, quick: bool) -> list[Shape]:
    if device == "cpu":
        rows = 512 if quick else 2048
        return [Shape(f"N={rows} V=32000 H=512", rows, 32000, 512, rows // 256, torch.float32)]
    if quick:
        return [Shape("Qwen2.5-0.5B N=2048", 2048, 151936, 896, 4, torch.bfloat16)]
    return [
        Shape("Qwen2.5-0.5B N=8192", 8192, 151936, 896, 16, torch.bfloat16),
        Shape("Llama-3.2-1B N=8192", 8192, 128256, 2048, 16, torch.bfloat16),
        Shape("Llama-3-8B N=8192", 8192, 128256, 4096, 16, torch.bfloat16),
    ]


def memory_shapes(device: str, quick: bool) -> list[Shape]:
    if device == "cpu":
        rows = 1024 if quick else 4096
        return [Shape(f"N={rows} V=32000 H=512", rows, 32000, 512, rows // 256, torch.float32)]
    return [Shape(f"Llama-3-8B one pair, N={n}", n, 128256, 4096, 2, torch.bfloat16) for n in (4096, 8192)]
