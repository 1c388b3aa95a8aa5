"""Accuracy, coverage, diversity and entropy of models whose answers are known."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from hdpo_train.evaluate import evaluate, pass_at_k, sample
from tests.train.tiny import make_model


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 2), (5, 2, 2), (6, 3, 4), (4, 4, 1), (7, 1, 7)])
def test_pass_at_k_counts_the_subsets_that_hold_a_right_one(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


class Coin:
    """Says token "a" with probability 0.75, else "b", then ends; asked greedily, "a"."""

    training, device = False, torch.device("cpu")

    def __init__(self, tokenizer):
        self.a, self.b = (tokenizer(letter)["input_ids"][0] for letter in "ab")
        self.eos, self.vocab = tokenizer.eos_token_id, len(tokenizer)

    def eval(self):
        return self

    def train(self, mode=True):
        return self

    def generate(self, input_ids, attention_mask, do_sample, max_new_tokens, **_):
        n = len(input_ids)
        word = torch.full((n,), self.a)
        if do_sample:
            word[torch.rand(n) >= 0.75] = self.b
        end = torch.full((n,), self.eos)
        first, second = torch.full((2, n, self.vocab), -torch.inf)
        first[:, self.a], first[:, self.b] = math.log(0.75), math.log(0.25)
        second[:, self.eos] = 0.0
        after = torch.zeros(n, self.vocab)  # what is sampled after the end must not count
        sequences = torch.cat([input_ids, torch.stack([word, end, end], 1)], 1)
        return SimpleNamespace(sequences=sequences, logits=(first, second, after))


def test_evaluate_gives_the_figures_of_a_known_distribution(tokenizer):
    prompts = [f"{i}" for i in range(300)]
    result = evaluate(Coin(tokenizer), tokenizer, prompts, lambda prompt, answer: answer == "b", num_samples=8, k=4)
    assert result.greedy_accuracy == 0
    assert result.sampled_accuracy == pytest.approx(0.25, abs=0.04)  # 4.5 standard errors
    assert result.pass_at_k == pytest.approx(1 - 0.75**4, abs=0.04)
    assert result.distinct_right == pytest.approx(1 - 0.75**8, abs=0.08)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2  # the end is certain, and counts as a token
    assert result.entropy == pytest.approx(entropy, rel=1e-5)


def test_sample_repeats_with_a_seed_and_leaves_torchs_generator_alone(tokenizer):
    model = make_model(spread=1.0)
    state = torch.get_rng_state()
    first = sample(model, tokenizer, ["a", "bcd"], 3, max_new_tokens=5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.answers == sample(model, tokenizer, ["a", "bcd"], 3, max_new_tokens=5, seed=1).answers
    assert first.answers != sample(model, tokenizer, ["a", "bcd"], 3, max_new_tokens=5, seed=2).answers
    assert [len(answers) for answers in first.answers] == [3, 3]


def test_sample_entropy_is_that_of_the_models_own_distribution(tokenizer):
    """The same from one forward over the finished text; ragged prompts are padded on the left."""
    model = make_model(spread=20.0)
    prompts = ["a", "bcd efg"]
    drawn = sample(model, tokenizer, prompts, 1, temperature=0, max_new_tokens=4)
    nats = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(4):
            logp = model(ids).logits[0, -1].log_softmax(-1)
            nats.append(-(logp.exp() * logp).sum().item())
            ids = torch.cat([ids, logp.argmax().view(1, 1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    assert drawn.entropy == pytest.approx(sum(nats) / len(nats), rel=1e-3)


def test_evaluate_refuses_nothing_to_measure(tokenizer):
    for prompts, k, samples in (([], 1, 1), (["a"], 9, 8), (["a"], 0, 8)):
        with pytest.raises(ValueError, match=f"k = {k}, num_samples = {samples}"):
            evaluate(Coin(tokenizer), tokenizer, prompts, lambda *_: True, num_samples=samples, k=k)
