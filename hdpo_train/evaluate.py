"""What a model can do on prompts whose answers a program checks: accuracy, coverage, diversity, entropy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Checker = Callable[[str, str], bool]  # (prompt, answer) -> is it right?


@dataclass
class Evaluation:
    greedy_accuracy: float  # share of prompts whose most likely answer, token by token, is right
    sampled_accuracy: float  # share of sampled answers that are right
    pass_at_k: float  # probability that one of k samples is right, unbiased
    distinct_right: float  # mean number of different right answers among a prompt's samples
    entropy: float  # nats per generated token, of the distribution the token was sampled from


@dataclass
class Samples:
    answers: list[list[str]]  # n for each prompt
    entropy: float  # mean nats per generated token up to and including the end


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    is_right: Checker,
    *,
    num_samples: int = 16,
    k: int = 8,
    max_new_tokens: int = 64,
    seed: int = 0,
    description: str = "Evaluating",
) -> Evaluation:
    """Greedy and sampled (temperature 1) answers to every prompt, judged.

    Raises ValueError if there is no prompt, or k is larger than num_samples.
    """
    if not prompts or not 1 <= k <= num_samples:
        found = f"{len(prompts)} prompts, k = {k}, num_samples = {num_samples}"
        raise ValueError(f"at least one prompt and 1 <= k <= num_samples are needed, got {found}")
    greedy = sample(model, tokenizer, prompts, 1, temperature=0, max_new_tokens=max_new_tokens, description=description)
    drawn = sample(
        model, tokenizer, prompts, num_samples, max_new_tokens=max_new_tokens, seed=seed, description=description
    )
    right = [[a for a in answers if is_right(p, a)] for p, answers in zip(prompts, drawn.answers, strict=True)]
    mean = lambda values: sum(values) / len(prompts)  # noqa: E731
    return Evaluation(
        greedy_accuracy=mean(is_right(p, a[0]) for p, a in zip(prompts, greedy.answers, strict=True)),
        sampled_accuracy=mean(len(answers) / num_samples for answers in right),
        pass_at_k=mean(pass_at_k(num_samples, len(answers), k) for answers in right),
        distinct_right=mean(len(set(answers)) for answers in right),
        entropy=drawn.entropy,
    )


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n: int,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 1024,
    description: str = "Sampling",
) -> Samples:
    """n answers to each prompt from the model's own distribution; temperature 0 takes the likeliest token each time."""
    choice: dict[str, Any] = {"do_sample": False}
    if temperature > 0:  # the model's own distribution: whatever its generation config says of top-k and top-p is off
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    repeated = [prompt for prompt in prompts for _ in range(n)]
    generator: Any = model  # typed as a module, generate() is not callable
    training = model.training
    model.eval()
    answers: list[str] = []
    nats, tokens = 0.0, 0
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(repeated), batch_size), desc=description, leave=False, unit="batch"):
            texts = repeated[start : start + batch_size]
            batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
            output = generator.generate(
                **batch.to(model.device), **choice, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            new = output.sequences[:, batch["input_ids"].shape[1] :]
            kept = _up_to_the_end(new, tokenizer.eos_token_id)
            for step, logits in enumerate(output.logits):
                nats += (_entropy(logits) * kept[:, step]).sum().item()
            tokens += int(kept.sum())
            answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    model.train(training)
    return Samples([answers[i : i + n] for i in range(0, len(answers), n)], nats / max(tokens, 1))


def pass_at_k(n: int, num_right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a right one: 1 − C(n − c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374, eq. 1.
    """
    return 1 - math.comb(n - num_right, k) / math.comb(n, k)


def _entropy(logits: Tensor) -> Tensor:
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)


def _up_to_the_end(tokens: Tensor, eos_token_id: int) -> Tensor:
    """1 for every token up to and including the first EOS, 0 after it."""
    ended = (tokens == eos_token_id).long()
    return (ended.cumsum(1) - ended == 0).long()
