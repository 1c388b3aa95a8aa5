"""Accuracy, coverage, diversity and entropy of models whose answers are known."""

import math

import pytest

from hdpo_train.evaluation.checkers import make_checker
from hdpo_train.evaluation.evaluate import EvalOptions, check_records, evaluate, grade
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.report import markdown
from hdpo_train.evaluation.samples import Sample
from hdpo_train.evaluation.scores import Estimate, Evaluation, Unjudged
from hdpo_train.evaluation.worker import Fault
from tests.train.tiny import make_chain, make_model

OPTIONS = EvalOptions(num_samples=8, k=(1, 4), max_new_tokens=4, batch_size=1024, self_bleu=False)


def test_evaluate_gives_the_figures_of_a_known_distribution(tokenizer):
    """ "a" with probability 0.75, or "b"; asked greedily, "a"."""
    x, a, b = (tokenizer(letter)["input_ids"][0] for letter in "xab")
    end = tokenizer.eos_token_id
    model = make_chain({x: {a: 0.75, b: 0.25}, a: {end: 1.0}, b: {end: 1.0}})
    problems = [Problem("x", {"number": number}) for number in range(300)]
    result = evaluate(model, tokenizer, problems, lambda problem, completion: completion == "b", OPTIONS, name="coin")
    assert (result.name, result.num_prompts, list(result.sampled)) == ("coin", 300, [1.0])
    sampled, greedy = result.sampled[1.0], result.greedy
    assert greedy.accuracy == Estimate(0, 0, 0) and greedy.num_samples == 1 and greedy.pass_at == {}
    assert sampled.accuracy.value == sampled.pass_at[1].value == pytest.approx(0.25, abs=0.04)  # 4.5 standard errors
    assert sampled.accuracy.low < 0.25 < sampled.accuracy.high
    assert sampled.pass_at[4].value == pytest.approx(1 - 0.75**4, abs=0.04)
    assert sampled.distinct_right.value == pytest.approx(1 - 0.75**8, abs=0.08)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2  # the end is certain, and counts as a token
    assert sampled.entropy.value == greedy.entropy.value == pytest.approx(entropy, rel=1e-4)


def test_evaluate_goes_on_from_its_file(tokenizer, tmp_path):
    problems = [Problem("a", {}), Problem("bcd", {})]
    options = EvalOptions(num_samples=4, k=(2,), temperatures=(0.5, 2), max_new_tokens=3, batch_size=3)
    path = tmp_path / "samples.jsonl"

    def run(model):
        return evaluate(model, tokenizer, problems, lambda _, text: "a" in text, options, name="m", samples_file=path)

    model = make_model(spread=5.0)
    first = run(model)
    path.write_bytes(path.read_bytes()[:500])
    assert run(model) == first and first.sampled[2.0].self_bleu is not None
    with pytest.raises(ValueError, match="model = "):
        run(make_model(seed=1))


def test_evaluate_refuses_nothing_to_measure(tokenizer):
    with pytest.raises(ValueError, match="there is no prompt"):
        evaluate(make_model(), tokenizer, [], lambda *_: True, OPTIONS, name="m")
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"pass@{k} needs 1 <= k <= num_samples, and num_samples = 8"):
            EvalOptions(num_samples=8, k=(1, k))


def test_grade_judges_every_different_completion_once():
    calls = []

    def checker(problem, completion):
        calls.append((problem.prompt, completion))
        return completion == "b"

    samples = [Sample(p, 1.0, i, text) for p in range(2) for i, text in enumerate("abab")]
    result = grade("m", [Problem("x", {}), Problem("y", {})], checker, samples, OPTIONS)
    assert result.sampled[1.0].accuracy.value == 0.5 and result.greedy is None and result.sampled[1.0].entropy is None
    assert sorted(calls) == [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")]


def test_grade_says_how_many_completions_were_cut(monkeypatch):
    warnings = []
    monkeypatch.setattr("hdpo_train.evaluation.evaluate.logger.warning", warnings.append)
    for ends in ((True, False), (True, True), (None, None)):
        samples = [Sample(0, 1.0, i, "a", ended=end) for i, end in enumerate(ends)]
        grade("m", [Problem("x", {})], lambda *_: True, samples, EvalOptions(num_samples=2, k=(), self_bleu=False))
    assert warnings == ["m: 1 completions (50.0%) did not end within max_new_tokens; judged as they are"]


def test_grade_counts_and_names_what_could_not_be_judged(monkeypatch, tmp_path):
    def checker(problem, completion):
        if completion in problem.record["odd"]:
            raise Fault(f"the checker raised {completion}", "and more")
        return completion == "b"

    warnings = []
    monkeypatch.setattr("hdpo_train.evaluation.evaluate.logger.warning", warnings.append)
    problems = [Problem("x", {"odd": "K"}), Problem("y", {"odd": "Zb"}), Problem("z", {"odd": "Z"})]
    texts = ("bbKb", "ZbZa", "bZab")  # 3 right, then none, then 2, of 4 each
    samples = [Sample(p, 1.0, i, text) for p in range(3) for i, text in enumerate(texts[p])]
    samples += [Sample(p, 0.0, 0, text) for p, text in enumerate("bZb")]
    result = grade("m", problems, checker, samples, EvalOptions(num_samples=4, k=(), self_bleu=False))
    assert result.sampled[1.0].accuracy.value == pytest.approx(5 / 12) and result.greedy.accuracy.value == 2 / 3
    z, k, b = (f"the checker raised {letter}" for letter in "ZKb")
    assert result.unjudged == (Unjudged(z, 4, 2), Unjudged(k, 1, 1), Unjudged(b, 1, 2))
    line = f"6 of 15 completions could not be judged, and count as wrong: 4 × {z} (first: prompt 2), 1 × {k} (first: "
    assert len(warnings) == 1 and warnings[0].startswith(f"m: {line}prompt 1), ")
    assert f"m: {line}" in markdown([result])
    result.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == result
    assert '"reason": "the checker raised Z",\n      "completions": 4' in (tmp_path / "evaluation.json").read_text()


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        (lambda text: text["x"], "prompt 1: TypeError.*the same on each of 5 completions"),
        (lambda text: int(text), None),  # a record's text is read
        (lambda text: text.split()[2] == "is", None),  # a sentence is
        (lambda text: {"": 1}[text] == 1, None),  # an empty one is
        (lambda text: {}[text], None),  # fails in other ways: who knows
    ],
)
def test_check_records_refuses_a_function_that_fails_always_in_the_same_way(reads, message):
    def checker(problem, completion):
        try:
            return bool(reads(completion))
        except Exception as error:
            raise Fault(type(error).__name__, repr(error), f" on {problem.prompt}") from None

    problems = [Problem(prompt, {"prompt": prompt, "answer": "12"}) for prompt in ("How many?", "And now?")]
    if message is None:
        check_records(checker, problems, "file.py:function")
    else:
        with pytest.raises(ValueError, match=message):
            check_records(checker, problems, "file.py:function")


def test_check_records_reads_every_record():
    record = {"answer": "12", "test": "def check(f): pass", "entry_point": "f"}
    problems = [Problem("x", record), Problem("y", record), Problem("z", {"prompt": "z"})]
    for spec, missing in {"gsm8k": "answer", "regex": "answer", "unit_tests": "test"}.items():
        checker = make_checker(spec) if spec != "unit_tests" else lambda *_: False
        with pytest.raises(ValueError, match=f"prompt 3: the problem 'z' has no '{missing}'"):
            check_records(checker, problems, spec)
        check_records(checker, problems[:2], spec)


def test_grade_refuses_ragged_samples_and_names_the_prompt_of_a_bad_record():
    problems = [Problem("x", {}), Problem("y", {})]
    samples = [Sample(0, 0.5, 0, "a"), Sample(0, 0.5, 1, "b"), Sample(1, 0.5, 0, "a")]
    with pytest.raises(ValueError, match=r"m: prompt 2 has 1 samples at temperature 0\.5, prompt 1 has 2"):
        grade("m", problems, lambda *_: True, samples, OPTIONS)

    def checker(problem, completion):
        if problem.prompt == "y":
            raise ValueError("no column answer")
        return True

    with pytest.raises(ValueError, match="prompt 2: no column answer"):
        grade("m", problems, checker, [*samples[:1], samples[2]], OPTIONS)
