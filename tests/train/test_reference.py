"""Reference log-probs: right, and a cache that is used when it fits and never otherwise."""

import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from hdpo_kernels import naive
from hdpo_train import reference
from hdpo_train.data.tokenize import PairCollator, tokenize_pairs
from hdpo_train.model.head import attach_loss
from tests.train.tiny import make_model, make_records


@pytest.fixture
def dataset(tokenizer):
    return tokenize_pairs(Dataset.from_list(make_records(7)), tokenizer)


@pytest.fixture
def policy(model):
    attach_loss(model)
    return model


@pytest.fixture
def refer(tmp_path, monkeypatch):
    """with_reference in this test's cache, and a list that gets an entry for every pass over the model."""
    passes = []
    compute = reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *args: passes.append(1) or compute(*args))

    def run(dataset, model, batch_size=3):
        return reference.with_reference(
            dataset, model, accelerator=Accelerator(cpu=True), collator=PairCollator(1), batch_size=batch_size,
            cache_dir=str(tmp_path / "cache"), name="train",
        )  # fmt: skip

    return run, passes, tmp_path / "cache"


def logps_of(dataset):
    return torch.tensor([dataset["ref_chosen_logp"][:], dataset["ref_rejected_logp"][:]]).T


def test_with_reference_equals_naive_log_probs_in_order(dataset, policy, refer):
    run, _, _ = refer
    result = logps_of(run(dataset, policy))
    for i, example in enumerate(dataset):
        for side, column in enumerate(("chosen_ids", "rejected_ids")):
            ids, completion = example["prompt_ids"] + example[column], example[column]
            logits = policy(input_ids=torch.tensor([ids])).logits[0, -len(completion) - 1 : -1]
            expected = naive._token_logp(logits, torch.tensor(completion), None, 1.0).logp.sum()
            torch.testing.assert_close(result[i, side], expected, rtol=1e-5, atol=1e-4)


def test_with_reference_reads_its_cache_whatever_the_batch_size(dataset, policy, refer):
    run, passes, _ = refer
    first = logps_of(run(dataset, policy))
    second = logps_of(run(dataset, policy, batch_size=5))
    assert torch.equal(first, second) and len(passes) == 1


def test_with_reference_recomputes_for_other_weights_data_or_lengths(dataset, policy, refer):
    run, passes, _ = refer
    run(dataset, policy)
    run(dataset.select(range(5)), policy)
    run(dataset.map(lambda row: {"chosen_ids": row["chosen_ids"][:1]}), policy)
    with torch.no_grad():
        policy.model.norm.weight[3] += 1e-3
    run(dataset, policy)
    policy.config.rope_parameters = {**policy.config.rope_parameters, "rope_theta": 500.0}
    run(dataset, policy)
    assert len(passes) == 5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other key"])
def test_with_reference_never_uses_a_broken_cache(damage, dataset, policy, refer, caplog, monkeypatch):
    run, passes, cache = refer
    first = logps_of(run(dataset, policy))
    (path,) = cache.iterdir()
    content = path.read_bytes()
    if damage == "other key":
        monkeypatch.setattr(reference, "cache_key", lambda *args: path.stem + "f" * 32)
    else:
        bad = {"truncated": content[:-5], "flipped": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}[damage]
        path.write_bytes(bad)
    logging.getLogger("transformers").addHandler(caplog.handler)
    second = logps_of(run(dataset, policy))
    assert torch.equal(first, second) and len(passes) == 2
    assert "computing them again" in caplog.text


def test_with_reference_leaves_no_partial_file(dataset, policy, refer, monkeypatch):
    run, passes, cache = refer
    monkeypatch.setattr(reference.os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(dataset, policy)
    monkeypatch.undo()
    assert not list(cache.glob("*.safetensors"))  # a partial one is not taken for a whole one
    run(dataset, policy)
    assert list(cache.glob("*.safetensors"))


def test_with_reference_names_the_pair_of_a_nan(dataset, refer):
    run, _, _ = refer
    broken = make_model()
    with torch.no_grad():
        broken.get_input_embeddings().weight[dataset[2]["rejected_ids"][0]] = float("nan")
    attach_loss(broken)
    with pytest.raises(FloatingPointError, match=r"pair .* of the train set"):
        run(dataset, broken)


def test_labels_stay_on_the_host_all_the_way(dataset, monkeypatch):
    """Where they are checked; and pinned, so that the loss's copy of them waits for nothing."""
    batch = PairCollator(1)([dataset[i] for i in range(2)])
    labels = batch["labels"].tensor
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor.clone())
    batch = send_to_device(pin_memory(batch), torch.device("meta"))
    inputs = reference.model_inputs(batch, torch.device("meta"), {})
    pairs = inputs["pairs"]
    assert pairs.labels.device.type == "cpu" and torch.equal(pairs.labels, labels) and pairs.labels is not labels
    assert {t.device.type for t in (pairs.rows, inputs["input_ids"])} == {"meta"}
