"""Does it matter that sums are kept in fp32? The head's gradient with its sums of pieces rounded to bf16, beside ours.

Peers warn that sums over pieces of the vocabulary, rounded to bf16 as they grow, let the policy's entropy drift over a
few dozen steps. Here the same steps are taken three times: in fp32, in bf16 autocast with our head, and in bf16
autocast with a head that rounds. The entropy is that of held-out answers, exact, computed in fp32.
"""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.real.data import Pairs, Record
from benchmarks.table import Table
from hdpo_kernels import linear_hdpo_loss, linear_logp, naive

FP32, EXACT, ROUNDED = "fp32", "bf16, sums in fp32", "bf16, sums rounded"
VOCAB, ROWS = 2048, 32  # of a piece
STEPS, SEEDS, LEARNING_RATE = 36, 2, 5e-6
_HELD_OUT = 6  # pairs


class _RoundedLogp(torch.autograd.Function):
    """Log-probs as exact as ours; d_hidden and d_weight are sums of pieces, in bf16."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
        logits = hidden.float() @ weight.float().T
        lse = logits.logsumexp(1)
        ctx.save_for_backward(hidden, weight, labels, lse)
        return logits.gather(1, labels.unsqueeze(1)).squeeze(1) - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, labels, lse = ctx.saved_tensors
        d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for rows in (slice(start, start + ROWS) for start in range(0, len(hidden), ROWS)):
            for start in range(0, len(weight), VOCAB):
                columns = torch.arange(start, min(start + VOCAB, len(weight)))
                p = (hidden[rows].float() @ weight[columns].float().T - lse[rows, None]).exp()
                onehot = labels[rows, None] == columns
                d_logits = ((onehot.float() - p) * grads[0][rows, None]).bfloat16().float()
                d_hidden[rows] += (d_logits @ weight[columns].float()).bfloat16()
                d_weight[columns] += (d_logits.T @ hidden[rows].float()).bfloat16()
        return d_hidden.float(), d_weight.float(), None


def rounded_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(N,) log-probs of the labels. Gradients come back in fp32, rounded."""
    return _RoundedLogp.apply(hidden, weight, labels)


class _Batch(NamedTuple):
    """Chosen and rejected of one pair."""

    ids: Tensor  # (2, T), padded on the right
    rows: Tensor  # (N,) positions in the flattened ids that predict a token of the answers
    labels: Tensor  # (N,)
    cu_seqlens: list[int]
    ref_logps: Tensor  # (2,)


def measure(table: Table, folder: Path, pairs: Pairs, steps: int = STEPS, seeds: int = SEEDS) -> None:
    """Entropy before and after so many steps of one pair each, of every seed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32)
    batches = _batches(load(), tokenizer, pairs.records[: steps + _HELD_OUT])
    held_out, trained_on = batches[:_HELD_OUT], batches[_HELD_OUT:]
    for seed in range(seeds):
        order = random.Random(seed).choices(trained_on, k=steps)
        add = partial(table.add, "entropy", f"{pairs.name}, {steps} steps, seed {seed}")
        for name in (FP32, EXACT, ROUNDED):
            model = load()
            before = _entropy(model, held_out)
            _train(model, order, name)
            add(name, "entropy before", (before,), "nat")
            add(name, "entropy after", (_entropy(model, held_out),), "nat")


def _train(model: Any, order: Sequence[_Batch], name: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for batch in order:
        with torch.autocast("cpu", torch.bfloat16, enabled=name != FP32):
            hidden = model.model(input_ids=batch.ids).last_hidden_state.flatten(0, 1)[batch.rows]
            if name == ROUNDED:
                logps = naive.sequence_sum(rounded_logp(hidden, model.lm_head.weight, batch.labels), batch.cu_seqlens)
                loss = naive.pair_loss(logps, batch.ref_logps, alpha=1.0, beta=0.1).loss
            else:
                loss = linear_hdpo_loss(hidden, model.lm_head.weight, *batch[2:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _entropy(model: Any, batches: Sequence[_Batch]) -> float:
    """Nats per token of the answers."""
    found = [linear_logp(*_inputs(model, batch)).entropy for batch in batches]
    return torch.cat(found).mean().item()


def _inputs(model: Any, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
    hidden = model.model(input_ids=batch.ids).last_hidden_state.flatten(0, 1)[batch.rows]
    return hidden, model.lm_head.weight, batch.labels


@torch.no_grad()
def _batches(model: Any, tokenizer: Any, records: Sequence[Record]) -> list[_Batch]:
    from datasets import Dataset

    from hdpo_train.data.tokenize import tokenize_pairs

    found = []
    for pair in tokenize_pairs(Dataset.from_list(list(records)), tokenizer, max_length=None):
        answers = [pair["chosen_ids"], pair["rejected_ids"]]
        texts = [pair["prompt_ids"] + answer for answer in answers]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])  # padding is after all that is read
        first = len(pair["prompt_ids"]) - 1
        rows = torch.tensor([n * width + first + i for n, answer in enumerate(answers) for i in range(len(answer))])
        labels, cu_seqlens = torch.tensor([*answers[0], *answers[1]]), [0, len(answers[0]), sum(map(len, answers))]
        batch = _Batch(ids, rows, labels, cu_seqlens, torch.zeros(2))
        logps = naive.sequence_sum(linear_logp(*_inputs(model, batch)).logp, cu_seqlens)
        found.append(batch._replace(ref_logps=logps))
    return found
