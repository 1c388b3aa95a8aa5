"""Scores of samples against counting by hand; intervals against how often they hold the truth."""

import builtins
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from hdpo_train.evaluation import scores
from hdpo_train.evaluation.scores import Estimate, Evaluation, bootstrap, distinct_ngrams, pass_at_k, score, self_bleus


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 2), (5, 2, 2), (6, 3, 4), (4, 4, 1), (7, 1, 7)])
def test_pass_at_k_counts_the_subsets_that_hold_a_right_one(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("c", "k"), [(1, 1), (1, 5000), (3, 4999), (4000, 100), (9999, 1)])
def test_pass_at_k_is_exact_for_thousands_of_samples(c, k):
    n = 10_000
    none = Fraction(1)
    for i in range(k):
        none *= Fraction(max(n - c - i, 0), n - i)
        if not none:
            break
    assert pass_at_k(n, c, k) == pytest.approx(float(1 - none), rel=1e-12)


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    """400 sets of 80 prompts. Of 95 %, percentile intervals are known to miss a little; four standard errors: 4.4 %."""
    rng = np.random.default_rng(1)
    difficulty = rng.beta(0.7, 0.4, size=(400, 80))  # what a model gets right of a prompt's samples, mostly all or none
    shares = rng.binomial(8, difficulty) / 8
    intervals = [bootstrap(row, seed=seed) for seed, row in enumerate(shares)]
    truth = 0.7 / 1.1
    assert np.mean([each.low <= truth <= each.high for each in intervals]) == pytest.approx(0.95, abs=0.044)


def test_bootstrap_intervals_of_a_ratio_hold_the_truth():
    """Nats per token, where long completions are the more certain: a mean of means would be off."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 40, size=(400, 80))
    nats = rng.gamma(2.0, 10 / (10 + tokens)) * tokens
    truth = np.mean(2.0 * 10 / (10 + np.arange(1, 40)) * np.arange(1, 40)) / np.mean(np.arange(1, 40))
    found = [bootstrap(*row, seed=seed) for seed, row in enumerate(zip(nats, tokens, strict=True))]
    assert np.mean([each.low <= truth <= each.high for each in found]) == pytest.approx(0.95, abs=0.044)
    assert found[0].value == nats[0].sum() / tokens[0].sum()


def test_bootstrap_repeats_and_takes_any_number_of_prompts(monkeypatch):
    values = np.random.default_rng(0).random(50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert bootstrap([0.25]) == Estimate(0.25, 0.25, 0.25)
    many = bootstrap(np.arange(200_000) % 2)  # more than one block of resamples
    assert many.low < many.value == 0.5 < many.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200_000), rel=0.1)


def test_bootstrap_leaves_prompts_without_weight_out():
    result = bootstrap([1.0, 0.0, 3.0], [1, 0, 1])
    assert result == Estimate(2.0, 1.0, 3.0)
    for values, weights in (([], None), ([1.0], [0.0]), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="a weight above 0"):
            bootstrap(values, weights)


def test_distinct_ngrams_counts_words_over_all_texts():
    texts = ["a b a", " a  b\n", ""]
    assert distinct_ngrams(texts, 1) == (2, 5)
    assert distinct_ngrams(texts, 2) == (2, 3)  # a b, b a, a b: none across texts
    assert distinct_ngrams(["a"], 2) == (0, 0)


def test_self_bleus_is_sacrebleus_score_against_the_others():
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = ["the cat sat on the mat", "the cat sat on a chair", "a dog sat on the mat"]
    each = [sacrebleu.sentence_bleu(text, [t for t in texts if t != text]).score / 100 for text in texts]
    alike, apart, empty = ["x y z w v"] * 4, ["a b c d e", "f g h i j"], ["", "", "a"]
    found = self_bleus([texts, alike, apart, empty])
    assert found[0] == pytest.approx(np.mean(each)) and 0.2 < found[0] < 0.9
    assert found[1] == 1 and found[2] == 0 and found[3] == pytest.approx(2 / 3)
    copies = [texts[0], texts[0], texts[1]]  # the copy is among the others
    assert self_bleus([copies])[0] == pytest.approx((2 + sacrebleu.sentence_bleu(texts[1], texts[:1]).score / 100) / 3)
    assert self_bleus([["a b c d"] * scores.SELF_BLEU_SAMPLES + apart]) == [1]  # no more than so many are looked at


def test_score_counts_by_hand():
    completions = [["4", " 4 ", "four is 4", "5"], ["x", "x", "", "y"]]
    right = [[True, True, True, False], [False, False, False, True]]
    found = score(completions, right, temperature=1, k=(1, 2, 4), nats=[6.0, 1.0], tokens=[8, 20], self_bleu=False)
    assert found.accuracy.value == 0.5 == found.pass_at[1].value
    assert found.pass_at[2].value == pytest.approx((1 + 0.5) / 2) and found.pass_at[4].value == 1
    assert found.distinct_right == Estimate(1.5, 1.0, 2.0)  # "4" and " 4 " are one
    assert found.distinct_n[1].value == pytest.approx((4 / 6 + 2 / 3) / 2)
    assert found.distinct_n[2].value == 1  # of the first prompt: the second has none
    assert found.self_bleu is None and found.entropy.value == 0.25
    assert (found.temperature, found.num_samples) == (1.0, 4)


def test_score_leaves_out_what_there_is_not():
    found = score([["4"], ["5"]], [[True], [False]], temperature=0)
    assert found.self_bleu is None and found.entropy is None and found.pass_at == {} and 2 not in found.distinct_n
    assert score([[""]], [[False]], temperature=0).distinct_n == {}


def test_score_refuses_what_cannot_be_scored():
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples of each prompt, there are 2"):
            score([["a", "b"]], [[True, False]], temperature=1, k=(k,))
    for right in ([], [[]], [True]):
        with pytest.raises(ValueError, match="not empty"):
            score([], right, temperature=1)


def test_self_bleu_without_sacrebleu_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert score([["a", "b"]], [[True, False]], temperature=1, self_bleu=False).self_bleu is None
    with pytest.raises(ValueError, match=r"pip install 'hdpo\[train,eval\]'"):
        score([["a", "b"]], [[True, False]], temperature=1)


def test_evaluation_saves_and_loads(tmp_path):
    one = score([["a b", "c"]], [[True, False]], temperature=0.7, k=(1, 2), nats=[1.0], tokens=[3], self_bleu=False)
    for greedy in (None, score([["é"]], [[True]], temperature=0)):
        evaluation = Evaluation("α = 0.9", 1, greedy, {0.7: one, 1.0: one})
        evaluation.save(tmp_path / "e.json")
        assert Evaluation.load(tmp_path / "e.json") == evaluation
    assert "α = 0.9" in (tmp_path / "e.json").read_text(encoding="utf-8")
