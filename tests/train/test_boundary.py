"""The boundary between prompt and completion, whatever the tokenizer does there."""

import pytest
from tokenizers import Tokenizer

from hdpo_train.data import tokenize as data
from tests.train.tokenizers_of_kinds import (
    CORPUS,
    KINDS,
    byte_level,
    pair,
    tokenize,
    tokenizers_of_kinds,
    with_specials,
    wrap,
)


@pytest.fixture(scope="module")
def tokenizers():
    return tokenizers_of_kinds()


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["byte-level, BOS"]


@pytest.fixture
def plain(tokenizers):
    """Ids of a text, without special tokens."""
    return lambda text: tokenizers["byte-level"](text)["input_ids"]


BOUNDARIES = [
    ("Question: how many?\nAnswer:", " there are 12"),
    ("Question: how many?\nAnswer: ", "there are 12"),
    ("Hello wor", "ld, the answer"),
    ("the", "m and so on"),
    ("the", "se"),
    ("foo\n", "\nbar"),
    ("foo\n", "bar"),
    ("foo  ", "  bar"),
    ("eggs ..", ". and"),
    ("the answer is 4", "2."),
    ("the answer", "!"),
    ("(", "a) b"),
    ("a", "b"),
]


def inference_ids(tokenizer, prompt):
    ids = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def assert_exact_boundary(tokenizer, record, row):
    assert row["prompt_ids"] == inference_ids(tokenizer, record["prompt"])
    for side in ("chosen", "rejected"):
        ids = row[f"{side}_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1] and tokenizer.bos_token_id not in ids
        text = tokenizer.decode(row["prompt_ids"] + ids, skip_special_tokens=True)
        # a space before the text is the tokenizer's own, and no part of the boundary
        assert text.removeprefix(" ") == (record["prompt"] + record[side]).removeprefix(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_tokenize_pairs_boundary_is_exact(tokenizers, kind):
    records = [pair(prompt, completion, completion + " and more") for prompt, completion in BOUNDARIES]
    for record, row in zip(records, tokenize(records, tokenizers[kind]), strict=True):
        assert_exact_boundary(tokenizers[kind], record, row)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenize_pairs_boundary_is_exact_anywhere_in_a_text(tokenizers, kind):
    text = CORPUS[0] + " " + CORPUS[2].replace("\n", " ")
    records = [pair(text[:cut], text[cut:], text[cut:] + "!") for cut in range(1, len(text))]
    for record, row in zip(records, tokenize(records, tokenizers[kind]), strict=True):
        assert_exact_boundary(tokenizers[kind], record, row)


def test_the_tokenizers_here_do_merge_and_prefix(tokenizers):
    """What the boundary tests rest on: tokens that span the boundary, and spaces put before a text."""
    byte, meta, llama = tokenizers["byte-level"], tokenizers["metaspace"], tokenizers["llama-2"]
    for tokenizer, prompt, text in [(byte, "Hello wor", "Hello world"), (meta, "the", "them"), (llama, "the", "them")]:
        ids = tokenizer(prompt)["input_ids"]
        assert tokenizer(text)["input_ids"][: len(ids)] != ids
    for tokenizer in (meta, llama):
        assert tokenizer.convert_ids_to_tokens(tokenizer("m")["input_ids"])[1].startswith("▁")


@pytest.mark.parametrize("kind", KINDS)
def test_tokenize_pairs_keeps_the_natural_tokens_where_they_respect_the_boundary(tokenizers, kind):
    tokenizer = tokenizers[kind]
    record = pair("Question: the answer is:", " there are 12 eggs", " The answer is 42.")
    (row,) = tokenize([record], tokenizer)
    joint = inference_ids(tokenizer, record["prompt"] + record["chosen"])
    assert row["prompt_ids"] + row["chosen_ids"] == [*joint, tokenizer.eos_token_id]


def test_tokenize_pairs_prefix_space_is_not_put_into_the_completion(tokenizers):
    for kind in ("metaspace", "llama-2", "byte-level, prefix"):
        (row,) = tokenize([pair("the answer is: ", "a", "b")], tokenizers[kind])
        assert tokenizers[kind].convert_ids_to_tokens(row["chosen_ids"]) == ["a", "</s>"], kind


def test_tokenize_pairs_adds_one_eos(tokenizer, plain):
    records = [pair("foo", " bar", " bar foo</s>"), pair("foo", " bar</s>", " foo</s></s>")]
    first, second = tokenize(records, tokenizer)
    eos = tokenizer.eos_token_id
    assert first["chosen_ids"] == second["chosen_ids"] == [*plain(" bar"), eos]
    assert first["rejected_ids"] == [*plain(" bar foo"), eos]
    assert second["rejected_ids"] == [*plain(" foo"), eos, eos]


def test_tokenize_pairs_ignores_padding_and_truncation_of_the_tokenizer_file():
    backend = with_specials(byte_level())
    reference = wrap(Tokenizer.from_str(backend.to_str()))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    records = [pair("Hello world, what is", " the answer?", " a"), pair("foo", " b", " c")]
    assert tokenize(records, wrap(backend)).to_list() == tokenize(records, reference).to_list()


def test_tokenize_pairs_where_no_boundary_can_be_found(tokenizers, monkeypatch):
    original = data._Encoder.__init__

    def only_bad_anchors(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.anchors = {"the": self._ids("the", False)}

    monkeypatch.setattr(data._Encoder, "__init__", only_bad_anchors)
    with pytest.raises(
        ValueError, match="1 x the tokenizer has no token boundary where the completion begins: record 2"
    ):
        tokenize([pair("foo ", "a", "b"), pair("the", "m", "se")], tokenizers["metaspace"])


def test_tokenize_pairs_keeps_characters_apart_that_a_tokenizer_would_compose(tokenizers, plain):
    """NFC makes one letter of e and an accent that follows; here the prompt ends between the two."""
    tokenizer = tokenizers["byte-level, NFC"]
    (row,) = tokenize([pair("cafe", "\u0301, and", "\u0301!")], tokenizer)
    assert tokenizer("cafe\u0301")["input_ids"] == tokenizer("caf\u00e9")["input_ids"]
    assert row["prompt_ids"] == [tokenizer.bos_token_id, *plain("cafe")]
    assert row["rejected_ids"] == [*plain("\u0301"), *plain("!"), tokenizer.eos_token_id]
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "<s>cafe\u0301, and</s>"
