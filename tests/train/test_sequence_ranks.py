"""Sequences that are split over processes (sp_size): the steps, metrics and model of one process."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hdpo_train import HDPOConfig
from hdpo_train.ranks import without_sequence_ranks
from tests.train.distributed_worker import flat_parameters, reference, train
from tests.train.sequence_worker import CASES
from tests.train.test_distributed import ROOT, assert_same_metrics, run
from tests.train.tiny import make_model


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "2 × 2 ranks"])
def ranks(request, tokenizer, tmp_path_factory):
    """All cases with sp_size 2, by DDP and by FSDP2; and gradients, with all ranks in one group."""
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer.save_pretrained(folder / "tokenizer")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    run([*torchrun, str(ROOT / "tests" / "train" / "sequence_worker.py"), str(folder)])
    return folder


@pytest.fixture(scope="module")
def one(tokenizer, tmp_path_factory):
    """The oracle: one process."""
    folder = tmp_path_factory.mktemp("one")
    tokenizer.save_pretrained(folder / "tokenizer")
    folder /= "one"
    results = {case: train(folder, case, ranks=1, **options) for case, options in CASES.items()}
    return folder, {case: (steps, reference(trainer)) for case, (trainer, steps) in results.items()}


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_split_sequences_take_the_steps_of_one_process(case, engine, ranks, one):
    """Parameters after every step, reference log-probs, and metrics: with grad_norm, which Adam would hide."""
    if not (result := ranks / engine / case / "result.pt").exists():
        pytest.skip("a token budget makes other batches for several ranks of data")
    steps, logps = torch.load(result)
    folder, results = one
    expected, expected_logps = results[case]
    difference = (steps - expected).abs()
    print(f"{engine}, {case}: max {difference.max():.1e}, mean {difference.mean():.1e}")
    assert difference.max() < 1e-5 and difference.mean() < 1e-8  # updates are 1e-3 a step; measured: 7.5e-7, 2e-10
    torch.testing.assert_close(logps, expected_logps)
    assert_same_metrics(ranks / engine / case, folder / case, relative=1e-4)
    path = result.parent / "model"
    saved = (
        PeftModel.from_pretrained(make_model(), path)
        if case == "adapter"
        else AutoModelForCausalLM.from_pretrained(path)
    )
    torch.testing.assert_close(flat_parameters(saved), steps[-1])


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Makes the options of a run on eight processes."""
    monkeypatch.setattr(HDPOConfig, "world_size", 8)
    return lambda **options: HDPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"cp_size": 2}, "cp_size=2"),
        ({"tp_size": 2}, "tp_size=2"),
        ({"sp_size": 3}, "does not divide the processes of this run .8."),
    ],
)
def test_other_ways_to_split_are_refused_by_name(config, words, arguments):
    with pytest.raises(ValueError, match=words):
        without_sequence_ranks(arguments(parallelism_config=config))


@pytest.mark.parametrize("given", ['{"sp_size": 2', '{"size": 2}', "2", {"sp_size": 0}])
def test_what_is_no_parallelism_config_is_refused(given, arguments):
    with pytest.raises(ValueError, match="parallelism_config is"):
        arguments(parallelism_config=given)


def test_accelerate_sees_ranks_of_data(arguments, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    args, size = without_sequence_ranks(arguments())
    assert (size, args.parallelism_config.total_size) == (2, 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args, size = without_sequence_ranks(arguments())
    assert (size, args.parallelism_config.dp_shard_size, args.parallelism_config.total_size) == (2, 8, 8)
