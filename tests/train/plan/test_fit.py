"""`hdpo-train plan --fit`: the longest pair that fits into some memory."""

import re

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from hdpo_train.cli.main import main
from hdpo_train.config import PlanConfig
from hdpo_train.model.packing import Layout
from hdpo_train.plan import fit
from hdpo_train.plan.memory import Memory, MicroBatch
from hdpo_train.plan.step import peak_memory

LLAMA = LlamaConfig(
    vocab_size=1000, hidden_size=32, intermediate_size=96, num_hidden_layers=8, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A config and nothing else."""
    LLAMA.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def planned(tmp_path, **options) -> PlanConfig:
    return PlanConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **options)


def said(folder, words: str, capsys) -> str:
    main(["plan", "--model_name_or_path", str(folder), *words.split()])
    return capsys.readouterr().out


def parts(*lines: tuple[float, float]):
    """Memory of a length: of each part of a step what it takes at 0, and a token."""
    asked = []

    def memory(length: int) -> Memory:
        asked.append(length)
        moments = [{"activations": round(start + slope * length)} for start, slope in lines]
        return Memory(max(moments, key=lambda moment: moment["activations"]), 0, moments)

    return memory, asked


@pytest.mark.parametrize("budget", [2e6, 1.3e7, 3e7, 1e9, 1e12])
def test_longest_fills_the_budget_by_few_runs(budget):
    memory, asked = parts((1e6, 1000), (1e7, 10), (0, 1200))  # the part that decides changes with the length
    if budget < 1e7:
        assert fit.longest(memory, budget, 2)[0] == 0
        return
    length, at = fit.longest(memory, budget, 2)
    assert length % 128 == 0 and at == memory(length) and at.total <= budget
    assert length == fit._LIMIT or memory(round(length * 1.02) + 256).total > budget
    assert len({*asked}) <= 8  # with the one of this test
    if length < fit._LIMIT:
        assert fit.longest(memory, budget, 2, extrapolate=True)[0] == pytest.approx(length, rel=0.02, abs=256)


def test_longest_finds_its_way_where_memory_is_not_linear():
    def memory(length: int) -> Memory:
        moment = {"activations": length**2 // 100 + 1000 * length}
        return Memory(moment, 0, [moment])

    length, at = fit.longest(memory, 4e9, 2)
    assert at.total <= 4e9 < memory(round(1.02 * length)).total


@pytest.mark.parametrize(
    ("text", "size"),
    [("79GiB", 79 * 2**30), ("79GB", 79e9), ("80e9", 80e9), ("1.5 TiB", 1.5 * 2**40), ("500mib", 500 * 2**20)],
)
def test_size_of_reads_units(tmp_path, text, size):
    assert fit.size_of(text, planned(tmp_path)) == size


def test_a_pair_that_fits_is_as_long_as_it_can_be(tmp_path, folder, capsys):
    printed = said(folder, "--on cpu --fit 79MiB --max_prompt_length 100 --gradient_checkpointing", capsys)
    length = int(re.search(r"on cpu: 2 × ([\d,]+) tokens", printed)[1].replace(",", ""))
    assert f"a prompt of 100 tokens, completions of {length - 100:,} each" in printed

    def total(length):
        batch = MicroBatch(Layout(True, True), [(100, length - 100, length - 100)])
        args = planned(tmp_path, gradient_checkpointing=True)
        return peak_memory(LLAMA, args, batch, AutoModelForCausalLM.from_config, tiles=True).total

    assert total(length) <= 79 * 2**20 < total(round(1.02 * length))
    assert "The model is made for 512 tokens" in printed


def test_no_pair_fits_into_too_little(folder, capsys):
    printed = said(folder, "--on cpu --fit 1MiB", capsys)
    assert "No pair fits into 1 MiB of one process on cpu. One of 2 × 128 tokens takes:" in printed
    assert "optimizer" in printed


def test_options_that_would_lengthen_it_are_sorted(folder, capsys):
    printed = said(folder, "--fit 1GiB --on cuda --packing False --tiled_layers False", capsys)
    lines = re.findall(r"^ +([\d,]+) +\((.*) ×\) +(--\w+)", printed.partition("one more option")[2], re.MULTILINE)
    lengths = [int(length.replace(",", "")) for length, *_ in lines]
    assert lengths == sorted(lengths, reverse=True)
    assert [words for *_, words in lines] == ["--packing", "--gradient_checkpointing", "--tiled_layers"]
    assert float(lines[1][1]) > 2 and re.search("No longer pair with .*--use_peft True", printed)


def test_a_plan_for_a_device_that_is_not_here(folder, capsys):
    offload = '--gradient_checkpointing --gradient_checkpointing_kwargs {"offload":true}'
    printed = said(folder, f"--on cuda --max_length 256 {offload} --dtype bfloat16", capsys)
    assert "One process on cuda" in printed and "on the host" in printed
    assert "no seconds: there is no GPU here to time a step on" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fit 79apples", "--fit 79apples is no size: write 79GiB, 79GB or 80e9"),
        ("--fit 0GiB", "--fit 0GiB is no size"),
        ("--fit", "--fit needs a size, as in --fit 79GiB"),
        ("--on tpu", "no such choice: 'tpu'"),
    ],
)
def test_a_size_that_is_none_is_named(folder, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        said(folder, words, capsys)
    assert stop.value.code == 2 and message in capsys.readouterr().err
