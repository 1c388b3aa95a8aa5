"""The loss of a run: several, one of the user's, and what is said of it."""

import json

import pytest
import torch

from hdpo_train.loss import load_own_loss
from hdpo_train.run.report import read_metrics
from tests.train.commands import main, refused, write
from tests.train.tiny import make_model, make_records

OWN = """
import torch.nn.functional as F

def logistic(policy, reference, lengths):
    chosen, rejected = (policy - reference).view(-1, 2).unbind(1)
    return -F.logsigmoid(0.1 * (chosen - rejected))
"""


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write(tmp_path / "pairs.jsonl", make_records())
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OPTIONS = """
--model_name_or_path model --dataset_name pairs.jsonl --output_dir out --overwrite_output_dir --use_cpu --max_steps 2
--logging_steps 1 --alpha 0.9 --ref_cache_dir reference --disable_tqdm True
"""


def train(*words: str) -> list[dict]:
    main([*OPTIONS.split(), *words])
    return read_metrics("out")


def test_a_loss_of_ones_own_takes_the_steps_of_the_same_loss_here(folder, capsys):
    start, *own = train("--loss_type", "own.py:logistic")
    assert start["loss_type"] == "own.py:logistic"
    assert (
        "Loss: own.py:logistic; a function of yours: logits once more in backward, 4 GEMMs." in capsys.readouterr().out
    )
    assert json.loads((folder / "out" / "run.json").read_text())["options"]["loss_type"] == "own.py:logistic"
    same = train()[1:]
    for mine, theirs in zip(own[:2], same[:2], strict=True):
        for key in ("loss", "rewards/margins", "entropy/chosen", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)


def test_several_losses_are_named_and_summed(folder, capsys):
    start, first, *_ = train("--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5")
    assert (
        start["loss_type"] == "sigmoid + sft"
        and "Loss: sigmoid + sft; one pass, 3 GEMMs; a pair longer" in capsys.readouterr().out
    )
    assert first["loss"] > 0.7 + 0.5  # of a random model the likelihood alone is more than a nat per token


def test_an_option_that_a_loss_of_ones_own_does_not_see_is_refused_at_the_door(folder, capsys):
    given = [*OPTIONS.split(), "--loss_type", "own.py:logistic", "--label_smoothing", "0.1"]
    message = "label_smoothing=0.1 has no effect on a loss_type that is a function of your own: leave it out"
    assert message in " ".join(refused(given, capsys).split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("own.py:nothing", "own.py has no function 'nothing'"),
        ("gone.py:f", "there is no file gone.py"),
        ("broken.py:f", "broken.py cannot be imported: SyntaxError"),
        ("own.py:scalars", "must return a tensor of one loss a pair, (4,), or their mean, (); got float"),
        ("dpo", "loss_type must be one of sigmoid, hinge"),
    ],
)
def test_a_loss_that_is_none_is_refused(folder, capsys, words, message):
    (folder / "broken.py").write_text("def f(:")
    (folder / "own.py").write_text(OWN + "\ndef scalars(policy, reference, lengths):\n    return 1.0\n")
    argv = "--model_name_or_path model --dataset_name pairs.jsonl --output_dir out --use_cpu --max_steps 1"
    given = [*argv.split(), "--per_device_train_batch_size", "4", "--ref_cache_dir", "reference", "--loss_type", words]
    assert message in " ".join(refused(given, capsys).split())


def test_load_own_loss_gives_the_function(folder):
    loss = load_own_loss(str(folder / "own.py:logistic"))
    assert loss(torch.zeros(4), torch.zeros(4), torch.ones(4)).tolist() == pytest.approx([0.6931, 0.6931], abs=1e-4)
