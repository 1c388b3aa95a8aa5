"""What samples say of a model: accuracy, coverage, diversity, entropy, with intervals. Needs no model and no torch."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000  # of the bootstrap
SELF_BLEU_SAMPLES = 16  # of a prompt, at most: the cost is quadratic
NGRAMS = (1, 2)  # of distinct-n
Read = TypeVar("Read")


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % bootstrap interval (percentiles, prompts resampled).

    The interval says what other prompts of the same kind would give, not what other samples or seeds of training
    would. Prompts that are all alike (all right, or there is only one) give an interval without width.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Of the samples at one temperature."""

    temperature: float
    num_samples: int  # of each prompt
    accuracy: Estimate  # share of samples that are right
    pass_at: dict[int, Estimate]  # k -> probability that one of k samples is right
    distinct_right: Estimate  # different right completions among a prompt's samples
    distinct_n: dict[int, Estimate]  # n -> different n-grams / n-grams of a prompt's samples
    self_bleu: Estimate | None  # 0 … 1; lower is more diverse
    entropy: Estimate | None  # nats per generated token of the distribution sampled from; greedy: of temperature 1


@dataclass(frozen=True)
class Unjudged:
    """Completions that the checker could not judge for the same reason; they count as wrong."""

    reason: str
    completions: int
    first_prompt: int  # from 1


@dataclass(frozen=True)
class Evaluation:
    """Of one model on one set of prompts."""

    name: str
    num_prompts: int
    greedy: Scores | None  # temperature 0, one sample
    sampled: dict[float, Scores]  # by temperature
    unjudged: tuple[Unjudged, ...] = ()  # the most frequent reason first

    def faults(self) -> str | None:
        """A line about the completions that could not be judged; None where all were."""
        if not self.unjudged:
            return None
        every = [*([self.greedy] if self.greedy else []), *self.sampled.values()]
        total = self.num_prompts * sum(scores.num_samples for scores in every)
        reasons = [f"{each.completions} × {each.reason} (first: prompt {each.first_prompt})" for each in self.unjudged]
        number = sum(each.completions for each in self.unjudged)
        return f"{number} of {total} completions could not be judged, and count as wrong: {', '.join(reasons)}"

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Raises OSError, or ValueError for a file that is damaged."""
        return read_json(Path(path), from_json)


def score(
    completions: Sequence[Sequence[str]],
    right: ArrayLike,
    *,
    temperature: float,
    k: Sequence[int] = (),
    nats: ArrayLike | None = None,
    tokens: ArrayLike | None = None,
    self_bleu: bool = True,
    seed: int = 0,
) -> Scores:
    """Scores of P prompts with n samples each.

    completions: (P, n). right: (P, n) bool. k: of pass@k, each in 1 … n. nats, tokens: (P,), a prompt's sum of token
    entropies and its number of generated tokens; None where unknown. seed: of the bootstrap.

    Raises ValueError if there is no sample, a k is out of range, or self-BLEU is asked for without sacrebleu.
    """
    right = np.asarray(right, dtype=bool)
    if right.ndim != 2 or not right.size:
        raise ValueError(f"right must be (prompts, samples) and not empty, got the shape {right.shape}")
    n = right.shape[1]
    if bad := [each for each in k if not 1 <= each <= n]:
        raise ValueError(f"pass@{bad[0]} needs at least {bad[0]} samples of each prompt, there are {n}")
    num_right = right.sum(1)
    distinct = {size: [distinct_ngrams(texts, size) for texts in completions] for size in NGRAMS}

    def mean(values: ArrayLike, weights: ArrayLike | None = None) -> Estimate:
        return bootstrap(values, weights, seed=seed)

    return Scores(
        temperature=float(temperature),
        num_samples=n,
        accuracy=mean(right.mean(1)),
        pass_at={each: mean([pass_at_k(n, int(c), each) for c in num_right]) for each in k},
        distinct_right=mean([len(_different(texts, row)) for texts, row in zip(completions, right, strict=True)]),
        distinct_n={  # a prompt without an n-gram has no share
            size: mean([u / t if t else 0 for u, t in pairs], [t > 0 for _, t in pairs])
            for size, pairs in distinct.items()
            if any(total for _, total in pairs)
        },
        self_bleu=mean(self_bleus(completions)) if self_bleu and n > 1 else None,
        entropy=None if nats is None else mean(nats, tokens),
    )


def bootstrap(values: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0) -> Estimate:
    """Σ values / Σ weights over prompts, (P,) each, with its percentile bootstrap interval; without weights the mean.

    Resamples without any weight, where some prompts have none, are left out of the interval.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or values.shape != weights.shape or not weights.sum() > 0:
        raise ValueError(f"values and weights must be (prompts,) with a weight above 0, got {values} and {weights}")
    generator = np.random.default_rng(seed)
    block = max(1, 2**22 // len(values))  # resamples at a time: bounded memory for any number of prompts
    ratios = []
    for start in range(0, RESAMPLES, block):
        chosen = generator.integers(len(values), size=(min(block, RESAMPLES - start), len(values)))
        above, below = values[chosen].sum(1), weights[chosen].sum(1)
        ratios.append(above[below > 0] / below[below > 0])
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return Estimate(float(values.sum() / weights.sum()), float(low), float(high))


def pass_at_k(n: int, num_right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a right one: 1 − C(n − c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374, eq. 1. Binomials are exact integers of any size, and rounded once.
    """
    return 1 - math.comb(n - num_right, k) / math.comb(n, k)


def distinct_ngrams(texts: Sequence[str], n: int) -> tuple[int, int]:
    """(different n-grams, n-grams) of words in the texts: the two parts of distinct-n (Li et al., 2016)."""
    ngrams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.split()
        ngrams += zip(*(words[i:] for i in range(n)), strict=False)
    return len(set(ngrams)), len(ngrams)


def self_bleus(completions: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """(P,) mean BLEU, 0 … 1, of a prompt's samples against its others (Zhu et al., 2018: Self-BLEU).

    sacrebleu's sentence BLEU (up to 4-grams, of what lengths the text has; exponential smoothing), on at most
    SELF_BLEU_SAMPLES samples a prompt: about 0.1 s for 16 of 150 words.
    """
    bleu = sentence_bleu()

    def one(texts: Sequence[str]) -> float:
        counts = Counter(texts[:SELF_BLEU_SAMPLES])
        total = 0.0
        for text, count in counts.items():
            others = [other for other in counts if other != text]
            # a sample that occurs twice has itself among the others: BLEU is 1
            total += count if count > 1 else bleu.sentence_score(text, others).score / 100
        return total / counts.total()

    return np.array([one(texts) for texts in completions])


def sentence_bleu() -> Any:
    """sacrebleu's metric; ValueError says how to install it."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ValueError(
            "self-BLEU needs sacrebleu: pip install 'hdpo[train,eval]'; or do without it (eval: --no_self_bleu, sweep: "
            "without --self_bleu)"
        ) from None
    return BLEU(effective_order=True)


def read_json(path: Path, parse: Callable[[Any], Read]) -> Read:
    """What `parse` makes of a JSON file that this program wrote. Raises OSError, or ValueError if it is damaged."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is damaged ({reason}): delete it, and the command that wrote it writes it again"
        ) from error


def from_json(data: dict[str, Any]) -> Evaluation:
    """The evaluation that `dataclasses.asdict` made this of."""

    def estimate(value: dict[str, float] | None) -> Any:
        return None if value is None else Estimate(*(float(value[name]) for name in ("value", "low", "high")))

    def scores(data: dict[str, Any]) -> Scores:
        counted = {
            name: {int(key): estimate(value) for key, value in data[name].items()} for name in ("pass_at", "distinct_n")
        }
        single = {name: estimate(data[name]) for name in ("accuracy", "distinct_right", "self_bleu", "entropy")}
        return Scores(**{**data, **counted, **single})

    return Evaluation(
        name=data["name"],
        num_prompts=data["num_prompts"],
        greedy=None if data["greedy"] is None else scores(data["greedy"]),
        sampled={float(temperature): scores(part) for temperature, part in data["sampled"].items()},
        unjudged=tuple(Unjudged(**each) for each in data.get("unjudged", ())),
    )


def _different(texts: Sequence[str], right: Sequence[bool]) -> set[str]:
    return {" ".join(text.split()) for text, is_right in zip(texts, right, strict=True) if is_right}
