"""Token ids of records: their forms, bad records, lengths, columns, the cache. The boundary: see test_boundary."""

import logging
import os
import re
import signal
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Audio, Dataset, DatasetDict, Features, Image, Json, List, Value
from transformers import PreTrainedTokenizerFast

from hdpo_train.data import tokenize as data
from hdpo_train.data.tokenize import load_records, tokenize_pairs
from tests.train.tokenizers_of_kinds import (
    CHATML,
    IDS,
    SPECIAL,
    assistant,
    byte_level,
    llama_2,
    pair,
    tokenize,
    tokenizers_of_kinds,
    user,
    with_specials,
    wrap,
)

REAL = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizers():
    return tokenizers_of_kinds()


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["byte-level, BOS"]


@pytest.fixture
def chat_tokenizer():
    return wrap(with_specials(byte_level()), chat_template=CHATML, additional_special_tokens=SPECIAL[3:])


@pytest.fixture
def library_log(caplog):
    """What the libraries log from warnings on; their loggers do not pass it on by themselves."""
    loggers = [logging.getLogger(name) for name in ("datasets", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
        caplog.set_level(logging.WARNING, logger.name)  # whatever an earlier test's command has set
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


@pytest.fixture
def plain(tokenizers):
    """Ids of a text, without special tokens."""
    return lambda text: tokenizers["byte-level"](text)["input_ids"]


# ---- forms of records -----------------------------------------------------------------------------------------------


def test_tokenize_pairs_returns_only_ids(tokenizer):
    records = [{**pair("foo", " bar", " foo"), "score": 1.5, "source": "x"}]
    dataset = tokenize(records, tokenizer)
    assert dataset.column_names == IDS
    assert all(isinstance(value, list) for value in dataset[0].values())


def test_tokenize_pairs_implicit_prompt(tokenizer):
    implicit = {"chosen": "Question: what?\nAnswer: there are", "rejected": "Question: what?\nAnswer: the answer"}
    explicit = pair("Question: what?\nAnswer:", " there are", " the answer")
    assert tokenize([implicit], tokenizer).to_list() == tokenize([explicit], tokenizer).to_list()


def test_tokenize_pairs_messages(chat_tokenizer):
    prompt = [{"role": "system", "content": "You are a helpful assistant."}, user("how many eggs?")]
    record = pair(prompt, [assistant("there are 12")], [assistant("42")])
    (row,) = tokenize([record], chat_tokenizer)
    expected = chat_tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert row["prompt_ids"] == expected
    for side in ("chosen", "rejected"):
        joint = chat_tokenizer.apply_chat_template(prompt + record[side], return_dict=False)
        assert row["prompt_ids"] + row[f"{side}_ids"] == joint
    assert chat_tokenizer.decode(row["rejected_ids"]) == "42<|im_end|>\n"  # no EOS but the template's own


def test_tokenize_pairs_messages_implicit_prompt(chat_tokenizer):
    shared = [user("foo"), assistant("bar"), user("and so on")]
    implicit = {"chosen": [*shared, assistant("them")], "rejected": [*shared, assistant("these")]}
    explicit = pair(shared, [assistant("them")], [assistant("these")])
    with_string = {**implicit, "prompt": "and so on"}
    expected = tokenize([explicit], chat_tokenizer).to_list()
    assert tokenize([implicit], chat_tokenizer).to_list() == expected
    assert tokenize([with_string], chat_tokenizer).to_list() == expected
    with pytest.raises(ValueError, match="1 x the prompt is a string, but not a message"):
        tokenize([{**implicit, "prompt": "something else"}], chat_tokenizer)


def test_tokenize_pairs_messages_exact_boundary_with_a_prefix_space():
    backend = llama_2()
    template = "<s>{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}</s>"
    tokenizer = wrap(with_specials(backend), chat_template=template + "{% endif %}{% endfor %}")
    (row,) = tokenize([pair([user("the")], [assistant("them")], [assistant("answer")])], tokenizer)
    assert row["prompt_ids"] == tokenizer.apply_chat_template([user("the")], return_dict=False)
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"], skip_special_tokens=True) == "[the]them"
    assert row["chosen_ids"][-1] == tokenizer.eos_token_id


def test_tokenize_pairs_hands_tools_and_options_to_the_template(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{{ style }}{% if tools %}{{ tools[0]['name'] }}{% endif %}{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    record = pair([user("foo")], [assistant("a")], [assistant("b")])
    record |= {"tools": '[{"name": "calc"}]', "chat_template_kwargs": {"style": "short "}}
    (row,) = tokenize([record], chat_tokenizer)
    assert chat_tokenizer.decode(row["prompt_ids"]) == "short calcfoo;"


def test_tokenize_pairs_messages_are_the_same_whatever_keys_others_have(chat_tokenizer):
    plain = {"chosen": [user("foo"), assistant("a")], "rejected": [user("foo"), assistant("b")]}
    named = {**plain, "chosen": [user("foo"), {**assistant("a"), "name": "x"}]}
    dataset = Dataset.from_list([named, plain])
    assert "name" in dataset[1]["chosen"][0]  # put there by Arrow
    assert tokenize_pairs(dataset, chat_tokenizer)[1] == tokenize([plain], chat_tokenizer)[0]


def test_tokenize_pairs_messages_need_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match="the eval data set has messages, but the tokenizer has no chat template"):
        tokenize([pair([user("a")], [assistant("b")], [assistant("c")])], tokenizer, name="eval")


def test_tokenize_pairs_strings_need_an_eos(tokenizers):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers["byte-level"].backend_tokenizer)
    with pytest.raises(ValueError, match=r"no eos_token.*set tokenizer\.eos_token"):
        tokenize([pair("a", "b", "c")], tokenizer)


def test_tokenize_pairs_names_the_missing_columns(tokenizer):
    records = [{"question": "a", "answer": "b", "chosen": "c"}]
    with pytest.raises(ValueError, match="the eval data set has no column rejected; it has question, answer, chosen"):
        tokenize(records, tokenizer, name="eval")
    with pytest.raises(ValueError, match="no column chosen and no column rejected"):
        tokenize([{"text": "a"}], tokenizer)


def test_tokenize_pairs_takes_its_own_result(tokenizer):
    records = [pair("Question: how many eggs?", " there are 12 eggs", " the answer is 42"), pair("", " foo", " bar")]
    for limits in ({}, {"max_length": 7, "max_prompt_length": 5}):
        once = tokenize(records, tokenizer, **limits)
        twice = tokenize_pairs(once, tokenizer, **{"max_length": None, **limits})
        assert twice.to_list() == once.to_list() and twice.column_names == IDS
    assert tokenize_pairs(once.with_format("torch"), tokenizer).to_list() == once.to_list()


def test_tokenize_pairs_checks_given_ids(tokenizer):
    good = {"prompt_ids": [1, 5], "chosen_ids": [6], "rejected_ids": [7]}
    rows = [good, {**good, "chosen_ids": []}, {**good, "rejected_ids": [6]}, {**good, "prompt_ids": []}]
    rows += [{**good, "chosen_ids": None}, {**good, "chosen_ids": [-100, 6]}, {**good, "chosen_ids": [2]}]
    with pytest.raises(ValueError) as error:
        tokenize(rows, tokenizer)
    for line in [
        "2 x chosen or rejected is empty: records 2, 7",
        "1 x chosen and rejected are the same: record 3",
        r"1 x the prompt has no token \(.*: record 4",
        "2 x one of prompt_ids, chosen_ids, rejected_ids is missing or not a list of token ids: records 5, 6",
    ]:
        assert re.search(line, str(error.value))
    assert tokenize(rows, tokenizer, on_bad_record="drop").to_list() == [good]
    with pytest.raises(ValueError, match="not a list of token ids"):
        tokenize([{"prompt_ids": [1.5], "chosen_ids": [1.0], "rejected_ids": [2.0]}], tokenizer)


# ---- bad records ----------------------------------------------------------------------------------------------------

GOOD = pair("Question: what?", " the answer", " foo bar")
SAME = "chosen and rejected are the same"
EMPTY = "chosen or rejected is empty"
CUT = "max_length=12 leaves no completion, or no difference"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (pair(None, " a", " b"), "prompt is missing"),
        (pair("a", None, " b"), "chosen is missing"),
        (pair("a", " a", None), "rejected is missing"),
        (pair("a", "", " b"), EMPTY),
        (pair("a", " b", ""), EMPTY),
        (pair("a", " b", "</s>"), EMPTY),
        (pair("a", "", ""), EMPTY),
        (pair("a", " b", " b"), SAME),
        (pair("a", " b", " b</s>"), SAME),
        (pair("Q: " * 20, " a", " b"), CUT),
        (pair("a", " foo" * 15, " foo" * 16), CUT),
    ],
)
def test_tokenize_pairs_bad_strings(tokenizer, caplog, record, kind):
    records = [GOOD, record, GOOD, record]
    with pytest.raises(ValueError) as error:
        tokenize(records, tokenizer, max_length=12, name="eval")
    message = str(error.value)
    assert message.startswith("2 of the 4 records of the eval data set cannot be used:\n  2 x " + kind)
    assert ": records 2, 4\n" in message and "--on_bad_record drop" in message
    assert kind is not CUT or "a larger --max_length" in message

    with caplog.at_level(logging.WARNING):
        kept = tokenize(records, tokenizer, max_length=12, on_bad_record="drop", name="eval")
    assert kept.to_list() == tokenize([GOOD, GOOD], tokenizer).to_list()
    assert f"2 of the 4 records of the eval data set cannot be used:\n  2 x {kind}" in caplog.text
    assert ": records 2, 4" in caplog.text

    with pytest.raises(ValueError, match="No record is left"):
        tokenize([record], tokenizer, max_length=12, on_bad_record="drop")


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (pair([user("a")], None, [assistant("b")]), "chosen is missing"),
        (pair(None, [assistant("a")], [assistant("b")]), "prompt is missing"),
        (pair([user(None)], [assistant("a")], [assistant("b")]), "a message of prompt has no content"),
        (pair([user("a")], [{"role": None, "content": "a"}], [assistant("b")]), "a message of chosen has no role"),
        (pair([user("a")], [], [assistant("b")]), EMPTY),
        (pair([user("a")], [assistant("")], [assistant("b")]), EMPTY),
        (pair([user("a")], [assistant("b")], [assistant("b")]), SAME),
        (pair([], [assistant("a")], [assistant("b")]), "the prompt has no message"),
        (
            pair([{"role": "moderator", "content": "a"}], [assistant("a")], [assistant("b")]),
            "the chat template refuses the messages or tools (no moderators)",
        ),
        (
            pair([user("secret")], [assistant("a")], [assistant("b")]),
            "the chat template writes the prompt differently inside the conversation",
        ),
    ],
)
def test_tokenize_pairs_bad_messages(chat_tokenizer, record, kind):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'moderator' %}{{ raise_exception('no moderators') }}{% endif %}"
        "{% endfor %}{% if messages[0].content == 'secret' %}{{ messages | length }}{% endif %}" + CHATML
    )
    good = pair([user("foo")], [assistant("a")], [assistant("b")])
    with pytest.raises(ValueError) as error:
        tokenize([good, record], chat_tokenizer)
    assert f"1 x {kind}" in str(error.value) and ": record 2\n" in str(error.value)
    kept = tokenize([good, record], chat_tokenizer, on_bad_record="drop")
    assert kept.to_list() == tokenize([good], chat_tokenizer).to_list()


def test_tokenize_pairs_messages_of_which_one_begins_with_the_other(chat_tokenizer):
    identical = [user("a"), assistant("b")]
    with pytest.raises(ValueError, match=SAME):
        tokenize([{"chosen": identical, "rejected": identical}], chat_tokenizer)
    with pytest.raises(ValueError, match="no column prompt, and chosen and rejected begin with nothing in common"):
        tokenize([{"chosen": [assistant("a")], "rejected": [assistant("b")]}], chat_tokenizer)


def test_tokenize_pairs_empty_prompt(tokenizers):
    record = pair("", "the answer", "foo")
    with pytest.raises(ValueError, match=r"1 x the prompt has no token \(.*BOS\): record 1"):
        tokenize([record], tokenizers["byte-level"])
    (row,) = tokenize([record], tokenizers["byte-level, BOS"])
    assert row["prompt_ids"] == [tokenizers["byte-level, BOS"].bos_token_id]


def test_tokenize_pairs_values_of_mixed_types(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 5, "rejected": "c"}\n')
    with pytest.raises(ValueError, match="1 x chosen is a number, not a string: record 2"):
        tokenize_pairs(load_records(str(file)), tokenizer)


def test_tokenize_pairs_counts_by_kind_and_shows_the_first_few(tokenizer):
    records = [GOOD] + [pair("a", "", " b")] * 7 + [pair("a", " b", " b")]
    with pytest.raises(ValueError) as error:
        tokenize(records, tokenizer)
    assert str(error.value).splitlines()[:3] == [
        "8 of the 9 records of the train data set cannot be used:",
        f"  7 x {EMPTY}: records 2, 3, 4, 5, 6, ...",
        f"  1 x {SAME}: record 9",
    ]


def test_tokenize_pairs_all_of_a_first_batch_bad(tokenizer):
    """The types of the columns do not come from the first rows."""
    records = [pair("a", "", "b")] * 1001 + [GOOD]
    assert len(tokenize(records, tokenizer, on_bad_record="drop")) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"on_bad_record": "skip"}, "on_bad_record='skip'"),
        ({"max_length": 1}, "max_length=1"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
    ],
)
def test_tokenize_pairs_refuses_arguments(tokenizer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tokenize([GOOD], tokenizer, **kwargs)


def test_tokenize_pairs_names_columns_without_effect(tokenizer, chat_tokenizer, caplog):
    more = {"score_chosen": 0.5, "tools": None, "source": "web"}
    tokenize([{**GOOD, **more}], tokenizer)
    assert "Columns of the train data set that have no effect: score_chosen, tools, source" in caplog.text
    caplog.clear()
    tokenize([pair([user("a")], [assistant("b")], [assistant("c")]) | more], chat_tokenizer, name="eval")
    assert "Columns of the eval data set that have no effect: score_chosen, source" in caplog.text
    caplog.clear()
    tokenize_pairs(tokenize([GOOD], tokenizer), tokenizer)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("column", "values", "feature"),
    [
        ("images", [[], ["a.png"]], List(Value("string"))),
        ("video", [None, "a.mp4"], Value("string")),
        ("images", ["[]", '["a.png"]'], Json()),
        ("picture", [None, {"path": "a.png", "bytes": None}], Image()),
        ("pictures", [[], [{"path": "a.png", "bytes": None}]], List(Image())),
        ("speech", [None, {"path": "a.wav", "bytes": None}], Audio()),
    ],
)
def test_tokenize_pairs_refuses_images_video_and_audio(tokenizer, column, values, feature):
    """The files are not there: they are not even opened. Columns that are empty in all records do no harm."""
    features = Features({key: Value("string") for key in GOOD} | {column: feature})
    rows = pa.Table.from_pylist([{**GOOD, column: value} for value in values])
    dataset = Dataset(rows).cast(features)
    with pytest.raises(ValueError, match=f"has {column} in a column: this trainer is for text"):
        tokenize_pairs(dataset, tokenizer)
    empty = tokenize_pairs(dataset.select([0]), tokenizer)
    assert empty.to_list() == tokenize([GOOD], tokenizer).to_list()


def test_tokenize_pairs_warns_of_prompts_repeated_in_all_records(tokenizer, caplog):
    repeated = pair("Q: a?\n", "Q: a?\nb", "Q: a?\nc")
    (row,) = tokenize([repeated], tokenizer)
    assert "In all records of the train data set chosen and rejected begin with the prompt" in caplog.text
    assert tokenizer.decode(row["chosen_ids"]) == "Q: a?\nb</s>"  # it may be meant
    caplog.clear()
    tokenize([repeated, GOOD], tokenizer)
    tokenize([{key: repeated[key] for key in ("chosen", "rejected")}], tokenizer)
    assert caplog.text == ""


def test_tokenize_pairs_says_that_a_process_was_killed(tokenizer, monkeypatch):
    parent = os.getpid()

    def die(record):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(data.forms, "from_strings", die)
    with pytest.raises(ChildProcessError, match=r"dataset_num_proc=2 was killed; .* give a smaller dataset_num_proc"):
        tokenize([GOOD] * 4, tokenizer, num_proc=2)


def test_tokenize_pairs_refuses_what_is_no_dataset(tokenizer):
    dataset = Dataset.from_list([GOOD])
    for other in (DatasetDict({"train": dataset}), dataset.to_iterable_dataset()):
        with pytest.raises(TypeError, match=type(other).__name__):
            tokenize_pairs(other, tokenizer)
    with pytest.raises(ValueError, match="the eval data set has no records"):
        tokenize_pairs(dataset.select([]), tokenizer, name="eval")


# ---- truncation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def abc(plain):
    """A record whose prompt has 10 tokens and BOS, chosen 5 and EOS, rejected 3 and EOS."""
    record = pair(" a" * 10, " b" * 5, " c" * 3)
    assert [len(plain(text)) for text in record.values()] == [10, 5, 3]
    return record


@pytest.mark.parametrize(
    ("max_length", "lengths"),
    [(None, (11, 6, 4)), (17, (11, 6, 4)), (16, (11, 5, 4)), (15, (11, 4, 4)), (14, (11, 3, 3)), (12, (11, 1, 1))],
)
def test_tokenize_pairs_max_length_cuts_the_end(tokenizer, abc, max_length, lengths):
    (full,) = tokenize([abc], tokenizer)
    (row,) = tokenize([abc], tokenizer, max_length=max_length)
    assert row == {column: full[column][:length] for column, length in zip(IDS, lengths, strict=True)}


@pytest.mark.parametrize("max_length", [11, 10, 2])
def test_tokenize_pairs_max_length_leaves_nothing(tokenizer, abc, max_length):
    with pytest.raises(ValueError, match=f"1 x max_length={max_length} leaves no completion"):
        tokenize([abc], tokenizer, max_length=max_length)


@pytest.mark.parametrize(("limit", "kept"), [(11, 10), (12, 10), (10, 9), (2, 1), (1, 0)])
def test_tokenize_pairs_max_prompt_length_keeps_bos_and_the_end(tokenizer, plain, limit, kept):
    record = pair(" a b c a b c a b c a", " b", " c")
    (row,) = tokenize([record], tokenizer, max_prompt_length=limit)
    assert row["prompt_ids"] == [tokenizer.bos_token_id, *plain(record["prompt"])[10 - kept :]]


def test_tokenize_pairs_max_prompt_length_without_bos(tokenizers, plain):
    (row,) = tokenize([pair(" a b c", " b", " c")], tokenizers["byte-level"], max_prompt_length=2)
    assert row["prompt_ids"] == plain(" b c")


def test_tokenize_pairs_cuts_the_prompt_before_the_completion(tokenizer, abc):
    (row,) = tokenize([abc], tokenizer, max_length=9, max_prompt_length=4)
    assert [len(row[column]) for column in IDS] == [4, 5, 4]


# ---- datasets' cache and processes ----------------------------------------------------------------------------------


def test_tokenize_pairs_is_cached_until_something_changes(tmp_path, monkeypatch, library_log, tokenizers):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    Dataset.from_list([GOOD] * 10).to_parquet(tmp_path / "a.parquet")
    records = load_records(str(tmp_path / "a.parquet"))
    tokenizer = tokenizers["byte-level"]

    def cached(**kwargs):
        return tokenize_pairs(records, **{"tokenizer": tokenizer, **kwargs}).cache_files[0]["filename"]

    first = cached()
    tokenizer(["a", "b c"], padding=False, truncation=True, max_length=1)  # leaves its settings behind
    assert cached() == first
    others = [cached(max_length=20), cached(tokenizer=tokenizers["byte-level, BOS"])]
    monkeypatch.setattr(data.inspect, "getsource", lambda module: "another version of the code")
    assert len({first, *others, cached()}) == 4
    assert list((tmp_path / "cwd").iterdir()) == []
    assert library_log.text == ""


def test_tokenize_pairs_in_several_processes(tokenizer, capfd):
    records = [GOOD, pair("a", "", " b"), *[GOOD] * 8]
    kwargs = {"on_bad_record": "drop", "max_length": 12}
    alone = tokenize(records, tokenizer, **kwargs).to_list()
    capfd.readouterr()
    assert tokenize(records, tokenizer, num_proc=2, **kwargs).to_list() == alone
    assert "fork" not in capfd.readouterr().err


def test_tokenize_pairs_long_text_without_warning(tokenizers, library_log):
    tokenizer = wrap(tokenizers["byte-level"].backend_tokenizer, model_max_length=4)
    record = pair("a longer text" * 9, " a", " b")
    tokenize([record], tokenizer)
    assert library_log.text == ""
    tokenizer(record["prompt"])
    assert "longer than the specified maximum" in library_log.text


# ---- real records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hh_harmless", "gsm8k"])
def test_tokenize_pairs_real_records(tmp_path, monkeypatch, name):
    path = REAL / f"{name}_preferences.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not on this machine")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    records = load_records(str(path))
    part = [text for record in records.select(range(300)) for text in record.values()]
    tokenizer = wrap(with_specials(byte_level(part, vocab_size=2000)))
    rows = tokenize_pairs(records, tokenizer, max_length=None)  # no record is bad
    assert len(rows) == len(records) == {"hh_harmless": 1574, "gsm8k": 2706}[name]
    prompts = tokenizer(records["prompt"][:])["input_ids"]
    assert rows["prompt_ids"][:] == prompts
    for side in ("chosen", "rejected"):
        ids = [prompt + completion for prompt, completion in zip(prompts, rows[f"{side}_ids"], strict=True)]
        texts = [record["prompt"] + record[side] for record in records]
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
