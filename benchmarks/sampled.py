"""What does the sampled gradient cost and how far off is it, against ε, beside the exact one and beside filters?"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import loss
from benchmarks.contest import Figure, measure_each, peak_mib, relative_error
from benchmarks.contestants import NAIVE, OURS, Contestant, one_gemm, ours_loss
from benchmarks.harness import NEVER, Deadline, quartiles, ratio, take_turns
from benchmarks.shapes import HEADS, Head, Problem, Shape, drawn_lengths, make_problem
from benchmarks.table import Table
from hdpo_kernels.sampled.entries import draw, most_entries

GEMM = "one GEMM"
SAMPLED, FILTERED = "sampled 2^{}", "filtered 2^{}"  # names of contestants, by the exponent of ε
_EXPONENTS = (-10, -8, -12)  # of ε, our default first
_OF_SMALL_VOCAB = (-8, -7, -6)  # where a row cannot have 2¹⁰ + 2 entries
EXPONENTS = tuple(dict.fromkeys(_EXPONENTS + _OF_SMALL_VOCAB))
_OTHERS = (OURS, NAIVE, "cce", "cce unfiltered")
_ENTROPIES = (2.0, 0.5, 4.0, 6.0)  # mean nats of a row; speed is promised up to the first


def shapes(device: str, quick: bool) -> list[Shape]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    trained = Shape("quickstart", Head(96, 289), (), dtype, sft_steps=220)
    if quick:
        made_up = Shape("N=256 V=5000 H=128", Head(128, 5000), drawn_lengths(4, 256), dtype)
        return [*_with_entropies(made_up, (2.0, 4.0)), trained._replace(name="quickstart, 20 steps", sft_steps=20)]
    if device == "cpu":
        made_up = Shape("N=1024 V=32000 H=2048", Head(2048, 32000), drawn_lengths(8, 1024), dtype)
    else:
        made_up = Shape("Llama-3-8B N=8192", HEADS["Llama-3-8B"], drawn_lengths(16, 8192), dtype)
    return [*_with_entropies(made_up, _ENTROPIES), trained]


def measure(
    table: Table, shape: Shape, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    problem = make_problem(shape, table.device)
    exponents = _EXPONENTS if most_entries(2.0 ** min(_EXPONENTS)) <= problem.weight.shape[0] else _OF_SMALL_VOCAB
    _count_entries(table, shape, problem, exponents)
    right = _measure_each(table, shape, problem, [c for c in contestants if c.name in _OTHERS], exponents, deadline)

    runs = {contestant.name: partial(contestant.forward_backward, problem) for contestant in right}
    # All have run before: no warm-up.
    turns: dict[str, Callable[[], object]] = {GEMM: one_gemm(problem), **runs}
    seconds = take_turns(turns, table.device, rounds=rounds, seconds=30, warm_up=0, deadline=deadline)
    packages = {contestant.name: contestant.package for contestant in right}
    for name, values in seconds.items():
        add = partial(table.add, "sampled", shape.name, name, package=packages.get(name, ""))
        median, low, high = quartiles(values)
        add("time", (1e3 * median, 1e3 * low, 1e3 * high), "ms")
        for base in (GEMM, OURS, NAIVE):
            if base != name and base in seconds:
                add(over(base), ratio(values, seconds[base]), "×")


def over(base: str) -> str:
    """The metric that compares a contestant with another, in its own rows."""
    return f"time / {base}"


def _measure_each(
    table: Table,
    shape: Shape,
    problem: Problem,
    others: Sequence[Contestant],
    exponents: Sequence[int],
    deadline: Deadline,
) -> list[Contestant]:
    """Peak memory and errors of one draw against fp64; returns who is timed.

    Not those whose loss is wrong; how far off a gradient is, is what is asked. And not filters in plain PyTorch.
    """
    truth = loss.truth(problem, True)

    def errors(results: Sequence[Tensor]) -> list[Figure]:
        value, d_hidden, d_weight = results
        off = relative_error(value, truth.result.loss)
        if not off < torch.finfo(shape.dtype).eps ** 0.5:
            raise ValueError(f"wrong: relative error {off:.2g} of loss")
        return [
            ("d_hidden, relative", relative_error(d_hidden, truth.d_hidden), ""),
            ("d_weight, relative", relative_error(d_weight, truth.d_weight), ""),
        ]

    def figures(contestant: Contestant) -> list[Figure]:
        results: tuple[Tensor, ...] = ()

        def run() -> tuple[Tensor, ...]:
            nonlocal results
            torch.manual_seed(0)
            results = contestant.forward_backward(problem)
            return results

        if table.device == "cuda":
            run()  # compiles and tunes
        if table.device == "cpu" and shape.sft_steps is not None:
            run()
            return errors(results)  # so small that a process's memory does not grow by it
        peak = peak_mib(run, table.device)
        return [("peak memory", peak, "MiB"), *errors(results)]

    sampled, filtered = [], []
    for e in exponents:
        ours = partial(ours_loss, gradient="sampled", epsilon=2.0**e)
        sampled.append(Contestant(SAMPLED.format(e), "", loss=ours))
        filtered.append(Contestant(FILTERED.format(e), "", partial(filtered_logp, epsilon=2.0**e)))
    measure_each(table, "sampled", shape, problem, filtered, lambda c: errors(c.forward_backward(problem)), deadline)
    return measure_each(table, "sampled", shape, problem, [*others, *sampled], figures, deadline)


@torch.no_grad()
def _count_entries(table: Table, shape: Shape, problem: Problem, exponents: Sequence[int]) -> None:
    """Mean entropy of the rows, and how many entries they have, sampled and filtered."""
    add = partial(table.add, "sampled", shape.name)
    logp = (problem.hidden.float() @ problem.weight.float().T).log_softmax(1)
    entropy = torch.distributions.Categorical(logits=logp, validate_args=False).entropy().mean().item()
    add("logits", "mean entropy", (entropy,), "nat")
    p = logp.exp_()
    for e in exponents:
        bound = most_entries(2.0**e)
        filtered = filtered_counts(p, problem.labels, 2.0**e)
        for name, counts in ((SAMPLED, sampled_counts(problem, 2.0**e)), (FILTERED, filtered)):
            add(name.format(e), "entries per row", (counts.double().mean().item(),), "")
            add(name.format(e), "most entries of a row", (counts.max().item(),), "")
        add(SAMPLED.format(e), "bound on entries of a row", (bound,), "")


def sampled_counts(problem: Problem, epsilon: float) -> Tensor:
    """(N,) entries of the sampled rows."""
    hidden, weight = problem.hidden, problem.weight
    torch.manual_seed(0)
    draws = draw(len(hidden), hidden.device)
    *_, (columns, values, counts) = torch.ops.hdpo.linear_logp(
        hidden, weight, None, problem.labels, draws, epsilon, problem.softcap, 1.0, None, hidden.dtype
    )
    return counts


def filtered_counts(p: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """(N,) entries of the rows that filtering leaves. p: (N, V) probabilities."""
    return _filtered(p, labels, epsilon).count_nonzero(1)


def filtered_logp(problem: Problem, *, epsilon: float) -> Tensor:
    """Log-probs whose gradient lacks every probability below ε but the label's: onehot − p · [p ≥ ε or label].

    Plain PyTorch with all logits, in fp32, so that nothing else is off.
    """
    logits = problem.hidden.float() @ problem.weight.float().T
    label_logits = logits.gather(1, problem.labels.unsqueeze(1)).squeeze(1)
    p = _filtered(logits.detach().softmax(1), problem.labels, epsilon)
    surrogate = label_logits - torch.linalg.vecdot(p, logits)
    return surrogate + (label_logits - logits.logsumexp(1) - surrogate).detach()


def _filtered(p: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """(N, V) probabilities, zero below ε but at the label."""
    return p.where((p >= epsilon).scatter_(1, labels.unsqueeze(1), True), 0)


def _with_entropies(shape: Shape, entropies: Sequence[float]) -> list[Shape]:
    return [shape._replace(name=f"{shape.name}, {entropy:g} nats", entropy=entropy) for entropy in entropies]
