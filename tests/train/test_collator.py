"""Tokenized pairs laid out as a batch, padded: what is scored, where, and with which reference."""

import random

import pytest
import torch
from datasets import Dataset

from hdpo_train.data.tokenize import PairCollator, tokenize_pairs
from hdpo_train.model.packing import PADDED, Layout
from tests.train.tiny import make_records


def random_examples(seed, count, ref=False):
    generator = random.Random(seed)

    def ids(least, most):
        return [generator.randrange(3, 100) for _ in range(generator.randint(least, most))]

    examples = [{"prompt_ids": ids(1, 9), "chosen_ids": ids(1, 12), "rejected_ids": ids(1, 12)} for _ in range(count)]
    for example in examples if ref else []:
        example |= {"ref_chosen_logp": generator.uniform(-50, 0), "ref_rejected_logp": generator.uniform(-50, 0)}
    return examples


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 2), (2, 5), (3, 16)])
def test_pair_collator_scores_exactly_the_completion_tokens(seed, count):
    examples = random_examples(seed, count)
    batch = PairCollator(pad_token_id=0)(examples)
    longest = max(len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples)
    assert batch["input_ids"].shape == (2 * count, longest)
    assert set(batch) == {"input_ids", "counts", "rows", "labels", "cu_seqlens", "num_tokens", "examples"}
    assert batch["examples"].rows is examples
    assert {t.dtype for t in (batch["input_ids"], batch["rows"], batch["labels"].tensor)} == {torch.int64}
    cu_seqlens = batch["cu_seqlens"]
    assert type(cu_seqlens) is list and {type(x) for x in cu_seqlens} == {int} and len(cu_seqlens) == 2 * count + 1

    rows, labels, scored, num_tokens = [], [], 0, 0
    for s in range(2 * count):
        example = examples[s // 2]
        prompt, completion = example["prompt_ids"], example["rejected_ids" if s % 2 else "chosen_ids"]
        tokens = prompt + completion
        assert batch["input_ids"][s].tolist() == tokens + [0] * (longest - len(tokens))
        assert cu_seqlens[s] == scored
        for t, token in enumerate(completion):
            rows.append(s * longest + len(prompt) + t - 1)
            labels.append(token)
        scored, num_tokens = scored + len(completion), num_tokens + len(tokens)
    assert batch["num_tokens"] == num_tokens
    assert batch["rows"].tolist() == rows and batch["labels"].tensor.tolist() == labels and cu_seqlens[-1] == scored
    assert batch["input_ids"].flatten()[batch["rows"] + 1].tolist() == labels


def test_pair_collator_small_example():
    examples = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10]},
    ]
    batch = PairCollator(pad_token_id=0)(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0], [7, 8, 0, 0, 0], [7, 9, 10, 0, 0]]
    assert batch["counts"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert PairCollator(0, Layout(packed=True, share=True))(examples)["counts"].tolist() == [
        [2, 2, 2, 1, 1, 1, 2, 1, 1, 1]
    ]
    assert batch["rows"].tolist() == [2, 3, 7, 10, 15, 16]
    assert batch["labels"].tensor.tolist() == [4, 5, 6, 8, 9, 10]
    assert batch["cu_seqlens"] == [0, 2, 3, 4, 6]


def test_pair_collator_interleaves_reference_logps():
    examples = random_examples(4, 3, ref=True)
    logps = PairCollator(pad_token_id=0)(examples)["ref_logps"]
    assert logps.dtype == torch.float32
    expected = [example[key] for example in examples for key in ("ref_chosen_logp", "ref_rejected_logp")]
    torch.testing.assert_close(logps, torch.tensor(expected))
    del examples[1]["ref_rejected_logp"]
    with pytest.raises(KeyError, match="ref_rejected_logp"):
        PairCollator(pad_token_id=0)(examples)


def test_pair_collator_takes_tensors_too():
    examples = random_examples(5, 3, ref=True)
    tensors = Dataset.from_list(examples).with_format("torch")
    expected, got = PairCollator(0)(examples), PairCollator(0)([tensors[i] for i in range(3)])
    assert got["cu_seqlens"] == expected.pop("cu_seqlens")
    assert got["num_tokens"] == expected.pop("num_tokens")
    expected.pop("examples")
    assert torch.equal(got["labels"].tensor, expected.pop("labels").tensor)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("layout", [PADDED, Layout(packed=True), Layout(packed=True, share=True)], ids=str)
def test_pair_collator_lays_out_on_the_cpu_whatever_the_default_device(layout):
    collator, examples = PairCollator(0, layout), random_examples(5, 3, ref=True)
    expected = collator(examples)
    with torch.device("meta"):
        got = collator(examples)
    assert expected.keys() == got.keys() and torch.equal(got["labels"].tensor, expected["labels"].tensor)
    for key, value in expected.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(got[key], value), key


def test_pair_collator_refuses_an_empty_prompt():
    examples = [*random_examples(6, 1), {"prompt_ids": [], "chosen_ids": [4], "rejected_ids": [5]}]
    with pytest.raises(ValueError, match="prompt_ids of pair 1"):
        PairCollator(pad_token_id=0)(examples)


def test_pair_collator_takes_the_rows_of_tokenize_pairs(tokenizer):
    dataset = tokenize_pairs(Dataset.from_list(make_records(2)), tokenizer)
    batch = PairCollator(tokenizer.eos_token_id)(list(dataset))
    expected = [token for row in dataset for side in ("chosen_ids", "rejected_ids") for token in row[side]]
    assert batch["labels"].tensor.tolist() == expected
