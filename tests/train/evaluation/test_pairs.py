"""Pairs of judged answers: right before wrong, each answer once, few of a prompt, near in length where asked for."""

import random
import statistics

from hdpo_train.evaluation.checkers import make_checker
from hdpo_train.evaluation.pairs import draw_pairs, judge_samples
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.samples import Sample
from hdpo_train.evaluation.worker import Fault


def answers(num_prompts: int = 40, seed: int = 0) -> list[dict[str, bool]]:
    """Of every prompt up to seven answers; a wrong one has twice the characters on average."""
    rng = random.Random(seed)
    found = []
    for _ in range(num_prompts):
        verdicts = [rng.random() < 0.5 for _ in range(rng.randint(0, 7))]
        found.append({f"{i}" * rng.randint(1, 30 if right else 60): right for i, right in enumerate(verdicts)})
    return found


def lengths(right):
    return [{answer: len(answer) for answer in of_prompt} for of_prompt in right]


def difference(pairs) -> float:
    return statistics.fmean(abs(len(pair.chosen) - len(pair.rejected)) for pair in pairs)


def test_draw_pairs_prefers_right_to_wrong_and_uses_no_answer_twice():
    right = answers()
    for matched in (None, lengths(right)):
        pairs = draw_pairs(right, 9, 0, matched)
        assert all(right[each.prompt][each.chosen] and not right[each.prompt][each.rejected] for each in pairs)
        used = [(prompt, answer) for prompt, *both in pairs for answer in both]
        assert len(used) == len(set(used))
        of_prompt = [min(sum(each.values()), len(each) - sum(each.values())) for each in right]
        assert len(pairs) == sum(of_prompt)  # all that there can be


def test_draw_pairs_takes_no_more_of_a_prompt_than_asked_for():
    right = answers()
    for most in (1, 2):
        prompts = [pair.prompt for pair in draw_pairs(right, most, 0)]
        both = {number for number, each in enumerate(right) if set(each.values()) == {True, False}}
        assert set(prompts) == both and max(map(prompts.count, both)) == most


def test_draw_pairs_depends_on_seed_and_answers_alone():
    right = answers()
    pairs = draw_pairs(right, 2, 5)
    assert pairs == draw_pairs([dict(reversed(each.items())) for each in right], 2, 5)
    assert pairs != draw_pairs(right, 2, 6) and pairs != sorted(pairs)  # in random order


def test_draw_pairs_matched_are_the_nearest_in_length():
    right = [{"a" * 3: True, "b" * 20: True, "c" * 9: False, "d" * 18: False, "e": False}]
    first, second = sorted(draw_pairs(right, 2, 0, lengths(right)), key=difference_of)
    assert {(len(each.chosen), len(each.rejected)) for each in (first, second)} == {(20, 18), (3, 1)}
    (only,) = draw_pairs(right, 2, 0, lengths(right), largest_difference=0.1)
    assert (len(only.chosen), len(only.rejected)) == (20, 18)
    assert not draw_pairs(right, 2, 0, lengths(right), largest_difference=0.09)


def difference_of(pair) -> int:
    return abs(len(pair.chosen) - len(pair.rejected))


def test_draw_pairs_matched_are_nearer_than_others_and_within_their_share():
    right = answers(600)
    free, nearest = draw_pairs(right, 1, 0), draw_pairs(right, 1, 0, lengths(right))
    within = draw_pairs(right, 1, 0, lengths(right), largest_difference=0.2)
    assert len(free) == len(nearest) > len(within) > 100
    assert difference(within) < difference(nearest) < 0.6 * difference(free)
    assert all(difference_of(each) <= 0.2 * max(map(len, each[1:])) for each in within)


def sample(completion: str, number: int = 0, **of_it) -> Sample:
    return Sample(0, 1.0, number, completion, **{"num_tokens": 3, "ended": True, **of_it})


def test_judge_samples_leaves_out_what_no_pair_can_be_made_of():
    calls = []

    def check(problem, completion):
        calls.append(completion)
        if completion == "?":
            raise Fault("the checker raised", "raised KeyError")
        return completion == "yes"

    samples = [sample("yes", num_tokens=2), sample("no"), sample("no"), sample("", num_tokens=1), sample("?")]
    samples += [sample("yes, and", ended=False), sample("no, but", ended=None)]
    judged = judge_samples([Problem("a", {}), Problem("b", {})], check, samples, "the model")
    assert judged.right == [{"yes": True, "no": False, "no, but": False}, {}]
    assert judged.lengths == [{"yes": 2, "no": 3, "no, but": 3}, {}] and judged.unit == "tokens"
    assert judged.left_out == {"repeated": 1, "empty": 1, "cut": 1, "unjudged": 1}
    assert judged.faults == {"the checker raised": 1} and calls == ["yes", "no", "?", "no, but"]
    assert (judged.prompts(True, False), judged.prompts(True), judged.prompts()) == (1, 0, 1)


def test_judge_samples_counts_characters_where_a_sample_does_not_tell_its_tokens():
    samples = [sample("yes"), sample("never", num_tokens=None)]
    judged = judge_samples([Problem("a", {})], make_checker("regex:yes"), samples, "the model")
    assert judged.lengths == [{"yes": 3, "never": 5}] and judged.unit == "characters"
