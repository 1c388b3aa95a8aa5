"""On real logits: how exact are log-probs from bf16, and how many entries and what error has the sampled gradient?"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import loss
from benchmarks.contest import relative_error
from benchmarks.contestants import OURS, Contestant, ours_loss
from benchmarks.real.data import Record
from benchmarks.real.rounding import ROUNDED, rounded_logp
from benchmarks.sampled import FILTERED, SAMPLED, filtered_counts, filtered_logp, sampled_counts
from benchmarks.shapes import Problem, with_reference
from benchmarks.table import Table
from hdpo_kernels import linear_logp
from hdpo_kernels.naive import sequence_sum

EXPONENT = -10  # of ε, the trainer's default
FILTERS = (-10, -12)
EQUAL = "filtered, equal entries"
DRAWS = 8
MEAN = f"sampled 2^{EXPONENT}, mean of {DRAWS} draws"
_RECORDS = 64  # have more tokens than are measured on
FP32_SOFTMAX, ALL_BF16, EXACT_BF16 = "bf16 logits, fp32 softmax", "all bf16", "exact, bf16"


def problem_of(folder: Path, records: Sequence[Record], tokens: int) -> Problem:
    """Hidden states that predict the completions of the first records, `tokens` of them at most; head, reference."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hdpo_train.data.tokenize import tokenize_pairs

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    some = Dataset.from_list(list(records[:_RECORDS]))
    pairs = tokenize_pairs(some, AutoTokenizer.from_pretrained(folder), max_length=None)
    states: list[Tensor] = []
    labels: list[list[int]] = []
    for pair in pairs:
        completions = [pair["chosen_ids"], pair["rejected_ids"]]
        if labels and sum(len(each) for each in [*labels, *completions]) > tokens:
            break
        for completion in completions:
            ids = torch.tensor([pair["prompt_ids"] + completion])
            with torch.no_grad():
                hidden = model.model(input_ids=ids).last_hidden_state[0]
            states.append(hidden[-len(completion) - 1 : -1])
            labels.append(completion)
    cu_seqlens = [0, *itertools.accumulate(map(len, labels))]
    weight = model.lm_head.weight.detach()
    return with_reference(torch.cat(states), weight, torch.tensor([*itertools.chain(*labels)]), cu_seqlens)


@torch.no_grad()
def accuracy(table: Table, name: str, problem: Problem) -> None:
    """Largest error of a sequence's log-prob from hidden states and weights in bf16, against fp64 from the same."""
    hidden, weight = problem.hidden.bfloat16(), problem.weight.bfloat16()
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        OURS: lambda h, y: linear_logp(h, weight, y).logp,
        FP32_SOFTMAX: lambda h, y: (h @ weight.T).float().log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1),
        ALL_BF16: lambda h, y: (h @ weight.T).log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1),
    }
    exact = weight.double()
    logps = {"": _in_pieces(lambda h, y: _logp(h.double() @ exact.T, y), hidden, problem)}
    for way, function in ways.items():
        logps[way] = _in_pieces(function, hidden, problem)
        off = (logps[way] - logps[""]).abs().max().item()
        table.add("log-prob", name, way, "log-prob of a sequence", (off,), "nat")


def _logp(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


def _in_pieces(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, problem: Problem, rows: int = 512
) -> Tensor:
    """(S,) sums over sequences in fp64, of log-probs computed some rows at a time."""
    pieces = zip(hidden.split(rows), problem.labels.split(rows), strict=True)
    return sequence_sum(torch.cat([function(h, y).double() for h, y in pieces]), problem.cu_seqlens)


def sampled(table: Table, name: str, problem: Problem) -> None:
    """Entries a row, and errors of the gradients: sampled at ε, filtered at ε, at less, and at as many entries.

    The mean of several draws shows what several steps see: errors of draws even out, those of filters stay.
    """
    add = partial(table.add, "sampled", name)
    p, entropy = _softmax(problem)
    add("logits", "mean entropy", (entropy,), "nat")
    entries = sampled_counts(problem, 2.0**EXPONENT).double().mean().item()
    thresholds = {FILTERED.format(e): 2.0**e for e in FILTERS}
    thresholds[EQUAL] = _threshold(p, problem.labels, entries)
    counts = {SAMPLED.format(EXPONENT): entries}
    counts |= {way: filtered_counts(p, problem.labels, each).double().mean().item() for way, each in thresholds.items()}
    del p
    add(EQUAL, "threshold", (thresholds[EQUAL],), "")

    rounded = partial(ours_loss, gradient="sampled", epsilon=2.0**EXPONENT)
    ways = [Contestant(SAMPLED.format(EXPONENT), "", loss=rounded), Contestant(MEAN, "", loss=rounded)]
    ways += [Contestant(way, "", partial(filtered_logp, epsilon=each)) for way, each in thresholds.items()]
    _errors(add, problem, ways, counts)
    in_bf16 = with_reference(problem.hidden.detach().bfloat16(), problem.weight.detach().bfloat16(), *problem[2:4])
    ways = [Contestant(EXACT_BF16, "", loss=ours_loss), Contestant(ROUNDED, "", lambda it: rounded_logp(*it[:3]))]
    _errors(add, in_bf16, ways, {})


def _errors(add: Any, problem: Problem, ways: Sequence[Contestant], counts: dict[str, float]) -> None:
    truth = loss.truth(problem, True)
    for way in ways:
        torch.manual_seed(0)
        draws = [way.forward_backward(problem)[1:] for _ in range(DRAWS if way.name == MEAN else 1)]
        d_hidden, d_weight = (torch.stack(each).mean(0) for each in zip(*draws, strict=True))
        if way.name in counts:
            add(way.name, "entries per row", (counts[way.name],), "")
        add(way.name, "d_hidden, relative", (relative_error(d_hidden, truth.d_hidden),), "")
        add(way.name, "d_weight, relative", (relative_error(d_weight, truth.d_weight),), "")


@torch.no_grad()
def _softmax(problem: Problem) -> tuple[Tensor, float]:
    """(N, V) probabilities, and the mean entropy of a row."""
    logp = (problem.hidden @ problem.weight.T).log_softmax(1)
    p = logp.exp()
    return p, -torch.linalg.vecdot(p, logp).mean().item()


def _threshold(p: Tensor, labels: Tensor, entries: float) -> float:
    """Below which probabilities must be dropped for so many entries a row to be left, by bisection."""
    low, high = -30.0, 0.0  # exponents of two: too many entries, too few
    while high - low > 0.01:
        middle = (low + high) / 2
        few = filtered_counts(p, labels, 2.0**middle).double().mean().item() < entries
        low, high = (low, middle) if few else (middle, high)
    return 2.0**high
