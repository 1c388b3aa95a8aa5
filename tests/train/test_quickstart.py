"""The quickstart's task, and its whole story at a tiny size."""

import itertools
import json
import random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hdpo_train import quickstart
from hdpo_train.evaluation.scores import from_json
from hdpo_train.quickstart import task

TINY = quickstart.Settings(
    hidden_size=64, num_layers=2, sft_steps=120, sft_batch_size=64, sft_learning_rate=5e-3, pair_prompts=600,
    samples_per_prompt=8, batch_size=8, epochs=1, held_out=8, eval_samples=8,
)  # fmt: skip


def test_split_prompts_keeps_sets_of_beads_apart():
    train, held_out = task.split_prompts(300, seed=3)
    assert len(held_out) == 300 and len(train) > 15_000
    assert not {task._beads(prompt) for prompt in train} & {task._beads(prompt) for prompt in held_out}
    assert (train, held_out) == task.split_prompts(300, seed=3) != task.split_prompts(300, seed=4)


def test_demonstrate_is_right_and_varied():
    rng = random.Random(0)
    for prompt in rng.sample(task.all_prompts(), 50):
        answers = {task.demonstrate(prompt, rng) for _ in range(20)}
        assert all(task.is_right(prompt, answer) for answer in answers)
        assert len(answers) > 2


@pytest.mark.parametrize(
    "answer", ["", " red", " red blue blue gold", " red blue gold gold", " red blue gold grey", "x"]
)
def test_is_right_refuses_wrong_beads(answer):
    assert not task.is_right("1 red 1 blue 1 gold:", answer)


def test_count_right_counts_orders():
    prompt = "1 red 2 blue 1 gold:"
    orders = {" ".join(order) for order in itertools.permutations(["red", "blue", "blue", "gold"])}
    assert task.count_right(prompt) == len(orders) == 12
    assert all(task.is_right(prompt, order) for order in orders)


def test_run_leaves_models_pairs_plots_and_a_table(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    results = quickstart.run(folder, TINY)
    printed = capsys.readouterr().out
    table = (folder / "results.md").read_text()
    assert table.strip() in printed
    assert list(results) == ["SFT (before)", "H-DPO, α = 1 (DPO)", "H-DPO, α = 0.7"]
    before = results["SFT (before)"]
    assert f"{before.sampled[1.0].entropy.value:.3f}" in table
    assert from_json(json.loads((folder / "results.json").read_text())[0]) == before
    for name in ("sft", "alpha-1", "alpha-0.7"):
        AutoModelForCausalLM.from_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / name)
    assert (folder / "alpha-0.7" / "report.png").exists() and (folder / "alpha.png").stat().st_size > 20_000
    assert quickstart.run(folder, TINY) == results  # again in the same folder: replaced, and the same numbers


def test_run_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="not a quickstart"):
        quickstart.run(tmp_path, TINY)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
