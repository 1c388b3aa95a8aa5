"""Records: where they come from."""

import gzip
import json

import datasets
import pytest
from datasets import Dataset

from hdpo_train import records
from hdpo_train.records import load_records

PAIRS = [
    {"prompt": "Q: two?\n", "chosen": "Yes.", "rejected": "No."},
    {"prompt": "Q: three?\n", "chosen": "Maybe.", "rejected": "Naïve ☃."},
]
LINES = [json.dumps(pair) for pair in PAIRS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(LINES)),
        ("a.jsonl.gz", "\n".join(LINES) + "\n"),
        ("blank.jsonl", "\n\n".join(LINES) + "\n\n"),
        ("A.JSONL", "\n".join(LINES)),
        ("a.json", json.dumps(PAIRS, indent=1)),
        ("lines.json", "\n".join(LINES)),
        ("a.json.gz", json.dumps(PAIRS)),
        ("odd [1] * name.jsonl", "\n".join(LINES)),
    ],
)
def test_load_records_reads_json(tmp_path, name, text):
    assert load_records(write(tmp_path / name, text)).to_list() == PAIRS


def test_load_records_reads_parquet(tmp_path):
    Dataset.from_list(PAIRS).to_parquet(tmp_path / "a.parquet")
    assert load_records(str(tmp_path / "a.parquet")).to_list() == PAIRS


def test_load_records_sees_that_a_file_changed(tmp_path):
    assert len(load_records(write(tmp_path / "a.jsonl", "\n".join(LINES)))) == 2
    assert len(load_records(write(tmp_path / "a.jsonl", LINES[1]))) == 1


def test_load_records_takes_a_slice(tmp_path):
    assert load_records(write(tmp_path / "a.jsonl", "\n".join(LINES)), split="train[1:]").to_list() == PAIRS[1:]


def test_load_records_reads_a_folder_by_split(tmp_path):
    folder = tmp_path / "folder"
    write(folder / "train.jsonl", LINES[0])
    write(folder / "test.jsonl", LINES[1])
    write(folder / "LICENSE", "not a record")
    assert load_records(str(folder)).to_list() == PAIRS[:1]
    assert load_records(str(folder), split="test").to_list() == PAIRS[1:]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "\n".join([*LINES, "{oops", *LINES]), r"a\.jsonl, line 3: malformed JSON \(Expecting property"),
        ("a.jsonl", LINES[0] + "\n\n" + LINES[1][:30], r"a\.jsonl, line 3: malformed JSON \(Unterminated string"),
        ("a.jsonl.gz", "\n" + LINES[0] + "\n{oops", r"a\.jsonl\.gz, line 3: malformed"),
        ("a.jsonl", LINES[0] + '\n["a", "b"]\n', r"a\.jsonl, line 2: a record is an object.*\[\"a\", \"b\"\]"),
        ("a.jsonl", LINES[0] + '\n{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}', "line 2: .*surrogate"),
        ("a.json", "[\n" + LINES[0] + ",\n" + LINES[1] + "\n", r"a\.json, line 4: malformed"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.jsonl", "\n \n", r"a\.jsonl is empty"),
        ("a.jsonl.gz", "", r"a\.jsonl\.gz is empty"),
        ("a.csv", "prompt,chosen,rejected\n", r"a\.csv: .*\.jsonl, .*\.parquet"),
    ],
)
def test_load_records_says_what_is_wrong_with_a_file(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_records(write(tmp_path / name, text))


def test_load_records_names_the_bad_file_of_a_folder(tmp_path):
    write(tmp_path / "folder" / "a.jsonl", "\n".join(LINES))
    write(tmp_path / "folder" / "b.jsonl", LINES[0] + "\n{oops")
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2"):
        load_records(str(tmp_path / "folder"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_load_records_names_a_damaged_binary_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is neither")
    with pytest.raises(ValueError, match=name):
        load_records(str(tmp_path / name))


def test_load_records_refuses_a_split_or_configuration_that_is_not_there(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES[0])
    with pytest.raises(ValueError, match=r"a\.jsonl has no split 'test'.*it has train"):
        load_records(path, split="test")
    with pytest.raises(ValueError, match="config='en'"):
        load_records(path, config="en")


@pytest.mark.parametrize(
    "name", ["no/such.jsonl", "no-such.parquet", "./no/such/folder", "/no/such/folder", "~/nosuch"]
)
def test_load_records_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_records(name)


def test_load_records_folder_without_records(tmp_path):
    write(tmp_path / "folder" / "a.txt", "a")
    with pytest.raises(FileNotFoundError, match="no file in this folder ends in one of"):
        load_records(str(tmp_path / "folder"))


def test_load_records_asks_the_hub_for_other_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    dataset = Dataset.from_list([{"chosen": "a"}])
    monkeypatch.setattr(records, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or dataset)
    assert load_records("some/prefs", "test", "en") is dataset
    assert asked == [(("some/prefs", "en"), {"split": "test"})]

    def absent(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(records, "load_dataset", absent)
    with pytest.raises(FileNotFoundError, match=r"'some/prefs' is no file or folder here.*no route"):
        load_records("some/prefs")
