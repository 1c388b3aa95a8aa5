"""The longest pair on several GPUs of 80 GiB, by `hdpo-train plan`, beside what others have published.

    python -m benchmarks.longest_by_plan

No GPU takes part: memory of one process at the peak of a step, weights and activations in bf16, AdamW, checkpointed
layers and tiles, one pair at a time. On N GPUs all N (or as many as divide the attention heads) share every sequence;
full fine-tuning shares weights, gradients and optimizer by FSDP2, adapters leave the weights whole. Leaves
results/longest_by_plan.md, which `python -m benchmarks.report` puts into docs/benchmarks.md. About five minutes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from benchmarks.table import RESULTS, commit, installed
from hdpo_train import markdown
from hdpo_train.config import PlanConfig, ScriptArguments
from hdpo_train.files import readable
from hdpo_train.model.loading import add_adapter
from hdpo_train.plan.fit import longest
from hdpo_train.plan.memory import Memory, MicroBatch
from hdpo_train.plan.step import layout_of, peak_memory
from hdpo_train.training import lora_config

GIB = 2**30
ROOM = 80 * GIB
LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
QWEN = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip
MISTRAL = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None, tie_word_embeddings=False,
)  # fmt: skip
# model, config, adapters?, GPUs, processes that share a sequence, published elsewhere
CASES: tuple[tuple[str, Any, bool, int, int, str], ...] = (
    ("Llama-3-8B, full", LLAMA, False, 1, 1, ""),
    ("Llama-3-8B, full", LLAMA, False, 2, 2, ""),
    ("Llama-3-8B, full", LLAMA, False, 4, 4, ""),
    ("Llama-3-8B, full", LLAMA, False, 8, 8, ""),
    ("Llama-3-8B, LoRA", LLAMA, True, 1, 1, ""),
    ("Llama-3-8B, LoRA", LLAMA, True, 2, 2, ""),
    ("Llama-3-8B, LoRA", LLAMA, True, 4, 4, ""),
    ("Llama-3-8B, LoRA", LLAMA, True, 8, 8, ""),
    ("Qwen2.5-7B, full", QWEN, False, 8, 4, "84k, 8 × A800"),
    ("Mistral-7B, full", MISTRAL, False, 8, 8, "128k, 8 × 80 GB (LongPO)"),
)


def fit(config: Any, adapters: bool, shards: int, ranks: int) -> tuple[int, Memory]:
    """Tokens of each sequence of the longest pair, and what it takes of a process."""
    args = PlanConfig(
        output_dir="unused", use_cpu=True, on="cuda", bf16=False, gradient_checkpointing=True, report_to="none",
        activation_checkpointing_kwargs=None,
    )  # fmt: skip

    def build(config: Any) -> Any:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return add_adapter(model, lora_config(ScriptArguments())) if adapters else model

    layout = layout_of(config, args, build)

    def memory(length: int) -> Memory:
        batch = MicroBatch(layout, [(1, length - 1, length - 1)], ranks)
        return peak_memory(config, args, batch, build, tiles=True, shards=shards)

    return longest(memory, ROOM, least=2)


def lines() -> Iterator[list[str]]:
    for name, config, adapters, gpus, ranks, published in CASES:
        length, memory = fit(config, adapters, 1 if adapters else gpus, ranks)
        largest = sorted(memory.device.items(), key=lambda item: -item[1])[:2]
        parts = ", ".join(f"{kind} {readable(size)}" for kind, size in largest)
        line = [name, str(gpus), str(ranks), f"{length:,}" if length else "none", parts, published]
        print(*line, sep="   ", flush=True)
        yield line


def main() -> None:
    header = [
        "by plan, 80 GiB a GPU",
        "GPUs",
        "sp_size",
        "tokens of each sequence",
        "most of it",
        "published elsewhere",
    ]
    about = f"No GPU took part. torch {installed('torch')}; commit {commit()}; again:"
    text = f"{about} `python -m benchmarks.longest_by_plan`.\n\n{markdown.table(header, lines())}\n"
    (RESULTS / "longest_by_plan.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
