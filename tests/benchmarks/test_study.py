"""The study of α: its task, what it says of known figures, and all of it at a tiny size."""

import random
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import report
from benchmarks.study import arithmetic
from benchmarks.study.__main__ import LARGER, QUICK, claims_table, main, study
from hdpo_train.sweep.report import Sweep
from tests.train.sweep.test_run import made_up

PROMPT = (
    "Ann has three boxes of four pens. She loses two. She gets as many again. She finds nine. How many pens has she?"
)


def test_arithmetic_steps_are_those_of_the_prompt():
    assert arithmetic.steps(PROMPT) == [
        ("boxes", 3, 4, 12), ("minus", 12, 2, 10), ("double", 10, 10, 20), ("plus", 20, 9, 29),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 3 times 4 is 12. Answer: 29", True), (" Answer: 29.", True), (" Answer: 5. Answer: 29\n", True),
        (" Answer: 28", False), (" Answer: 290", False), ("29", False), ("", False), (" Answer: 29 pens", False),
        (" Answer: ２９", False), (" Answer: " + "9" * 5000, False),
    ],
)  # fmt: skip
def test_arithmetic_is_right_by_the_last_number(answer, right):
    assert arithmetic.is_right(PROMPT, answer) == right


def test_arithmetic_demonstrations_are_right_and_varied(monkeypatch):
    monkeypatch.setattr(arithmetic, "NUM_PROMPTS", 300)
    prompts, held_out = arithmetic.split_prompts(40, seed=1)
    assert len(held_out) == 40 and (prompts, held_out) == arithmetic.split_prompts(40, seed=1)
    calculations = [{tuple(arithmetic.steps(prompt)) for prompt in each} for each in (prompts, held_out)]
    assert not calculations[0] & calculations[1]
    assert {len(steps) for steps in calculations[0]} == {2, 3, 4}
    rng = random.Random(0)
    for prompt in held_out:
        answers = {arithmetic.demonstrate(prompt, rng) for _ in range(20)}
        assert len(answers) > 3 and all(arithmetic.is_right(prompt, answer) for answer in answers)
        assert all(2 <= step[3] <= arithmetic.MOST for step in arithmetic.steps(prompt))


def test_larger_model_has_the_size_it_says():
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from hdpo_train.quickstart.model import new_model, train_tokenizer

    rng = random.Random(0)
    texts = [
        prompt + arithmetic.demonstrate(prompt, rng) for prompt in (arithmetic._new_prompt(rng) for _ in range(400))
    ]
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(texts, LARGER.vocab_size)
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert max(lengths) < arithmetic.MAX_LENGTH
    with torch.device("meta"):
        model: LlamaForCausalLM = new_model(
            tokenizer, LARGER.hidden_size, LARGER.num_layers, arithmetic.MAX_LENGTH, seed=0
        )
    assert 10e6 < model.num_parameters() < 100e6


def test_claims_are_decided_by_the_figures():
    result = made_up()
    for evaluation in [each for seeds in (result.base, *result.runs.values()) for each in seeds]:
        for scores in evaluation.sampled.values():
            scores.pass_at[8] = scores.pass_at[4]
    text = claims_table(result)
    said = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines()}
    assert text.startswith("Entropy after training rises with α: Page's trend test, L = 90, p = 7.2e-05")
    assert said["α < 1 raises greedy accuracy"][0] == "+0.0 ± 0.0 %: not distinguishable"
    assert re.fullmatch(r"\+(29\.9|30\.\d) ± 0\.\d %: holds", said["α < 1 raises sampled accuracy"][0])
    assert said["α > 1 raises distinct right"][-1] == "-2.40 ± 0.00: the opposite"
    assert said["α > 1 raises distinct-2"][-1] == "+0.000 ± 0.000: not distinguishable"
    better, same, outside = said["α raises sampled accuracy at equal entropy"]
    assert better.endswith("holds") and same.endswith("not distinguishable")
    assert outside == "entropy out of the temperatures' reach"
    assert "and here are 14." in text  # 2 rows of one α, 3 of two, 3 of three less the one outside


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--quick"], "--quick needs --out"), (["--larger", "--quick", "--out", "x"], "not for --larger")],
)
def test_main_refuses_before_anything_runs(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_main_refuses_the_larger_study_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--larger"])
    assert "--larger needs a CUDA GPU, and there is none here" in capsys.readouterr().err


def test_main_runs_the_study_and_the_docs_take_its_beginning(tmp_path):
    main(["--quick", "--out", str(tmp_path)])
    result = Sweep.load(tmp_path / "study.json")
    assert sorted(result.runs) == [0.7, 1.0, 1.4] and result.seeds == len(result.base) == 2 and result.per_seed
    assert (tmp_path / "study.png").stat().st_size > 10_000
    text = report.study(tmp_path)
    for line in ("| before training |", "| α = 1.4 |", "| α > 1 raises pass@8 |", "Page's trend test"):
        assert line in text and line in (tmp_path / "study.md").read_text()
    assert "[plots](../benchmarks/study/study.png)" in text and "In full" not in text
    assert "On CUDA: not measured yet (`python -m benchmarks.study --larger`)." in text


def test_study_of_the_larger_task_at_a_tiny_size(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "NUM_PROMPTS", 200)
    # what a model knows after so few steps isn't arithmetic
    monkeypatch.setattr(arithmetic, "is_right", lambda prompt, answer: len(answer) % 2 == 0)
    settings = replace(QUICK, hidden_size=16, vocab_size=600, sft_steps=4, pair_prompts=4, eval_samples=8, held_out=2)
    result = study(tmp_path / "work", arithmetic, settings, alphas=(1.0,), seeds=1, temperatures=(0.8,))
    assert sorted(result.runs[1.0][0].sampled) == [0.8, 1.0]
    assert result.title == f"{arithmetic.TITLE}, evaluated on 2 held-out prompts"
