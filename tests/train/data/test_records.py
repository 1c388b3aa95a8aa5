"""Records: where they come from."""

import gzip
import json
import os

import datasets
import pytest
from datasets import Dataset, DatasetDict

from hdpo_train.data import records
from hdpo_train.data.records import load_records, training_split

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
        ("crlf.jsonl", "\r\n".join(LINES) + "\r\n"),
        ("mark.jsonl", "\ufeff" + "\n".join(LINES)),
        ("mark.json", "\ufeff\n" + json.dumps(PAIRS)),
    ],
)
def test_load_records_reads_json(tmp_path, name, text):
    assert load_records(write(tmp_path / name, text)).to_list() == PAIRS


def test_load_records_reads_parquet(tmp_path):
    Dataset.from_list(PAIRS).to_parquet(tmp_path / "a.parquet")
    assert load_records(str(tmp_path / "a.parquet")).to_list() == PAIRS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder/a.jsonl", "folder/a.parquet"])
def test_load_records_sees_new_contents_with_the_same_time_and_size(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    source = str(path if path.parent == tmp_path else path.parent)
    for pair in (PAIRS[0], {**PAIRS[0], "chosen": "Yep."}, PAIRS[0]):
        dataset = Dataset.from_list([pair])
        dataset.to_parquet(path) if path.suffix == ".parquet" else dataset.to_json(path)
        os.utime(path, ns=(10**18, 10**18))
        assert load_records(source).to_list() == [pair]


def test_load_records_reads_the_same_contents_from_its_cache(tmp_path, monkeypatch):
    first = load_records(write(tmp_path / "a.jsonl", "\n".join(LINES)))
    monkeypatch.setattr(records, "_write", lambda *args: pytest.fail("read again"))
    again = load_records(write(tmp_path / "moved.jsonl", "\n".join(LINES)))
    assert again.to_list() == PAIRS and again.cache_files == first.cache_files
    assert again._fingerprint == first._fingerprint  # what is computed from it is found again too


def test_load_records_keeps_values_of_every_type(tmp_path):
    rows = [
        {"a": "42", "b": 1, "c": 1.5, "d": True, "e": ["null", None], "f": None, "g": {"x": None}},
        {"a": [{"k": 1}], "b": 2**70, "c": 2, "d": None, "e": "[1]", "f": "Naïve ☃", "g": {}},
    ]
    dataset = load_records(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    text = dataset.with_format("arrow")[:].to_pylist()  # big numbers are beyond what datasets decodes
    as_json = [{key: json.loads(row[key]) if row[key] else None for key in "abceg"} for row in text]
    assert as_json == [{key: row[key] for key in "abceg"} for row in rows]
    assert dataset["a"][:] == ["42", [{"k": 1}]] and dataset["d"][:] == [True, None] and dataset["f"][1] == rows[1]["f"]


def test_load_records_takes_columns_that_only_later_lines_have(tmp_path):
    lines = [json.dumps({"chosen": "a"})] * 2000 + [json.dumps({"prompt": "x", "score": float("nan")})]
    dataset = load_records(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert dataset[0] == {"chosen": "a", "prompt": None, "score": None}
    assert dataset[2000]["prompt"] == "x" and dataset[2000]["score"] != dataset[2000]["score"]


@pytest.mark.parametrize("as_dict", [False, True])
def test_load_records_reads_what_save_to_disk_wrote(tmp_path, as_dict):
    dataset = Dataset.from_list(PAIRS)
    saved = DatasetDict({"train": dataset, "test": dataset.select([1])}) if as_dict else dataset
    saved.save_to_disk(tmp_path / "saved")
    assert load_records(str(tmp_path / "saved")).to_list() == PAIRS
    assert load_records(str(tmp_path / "saved"), split="train[1:]").to_list() == PAIRS[1:]
    if as_dict:
        assert load_records(str(tmp_path / "saved"), split="test").to_list() == PAIRS[1:]
        next((tmp_path / "saved" / "train").glob("*.arrow")).unlink()
        with pytest.raises(ValueError, match=r"saved cannot be loaded: .*\.arrow"):
            load_records(str(tmp_path / "saved"))
    else:
        with pytest.raises(ValueError, match=r"saved has no split 'test'.*it has train"):
            load_records(str(tmp_path / "saved"), split="test")


def test_training_split_of_a_dict(caplog):
    train, test = Dataset.from_list(PAIRS), Dataset.from_list(PAIRS[1:])
    assert training_split(train) is train
    assert training_split(DatasetDict({"test": test, "train": train})) is train
    assert 'splits test, train: "train" is trained on' in caplog.text
    for kind in (DatasetDict, dict):
        with pytest.raises(ValueError, match=rf"a {kind.__name__} with .* test, validation: .*=dataset\['test'\]"):
            training_split(kind({"test": test, "validation": train}))


def test_load_records_takes_a_slice(tmp_path):
    assert load_records(write(tmp_path / "a.jsonl", "\n".join(LINES)), split="train[1:]").to_list() == PAIRS[1:]


def test_load_records_reads_a_folder_by_split(tmp_path):
    folder = tmp_path / "folder"
    write(folder / "train.jsonl", LINES[0])
    write(folder / "test.jsonl", LINES[1])
    write(folder / "LICENSE", "not a record")
    assert load_records(str(folder)).to_list() == PAIRS[:1]
    assert load_records(str(folder), split="test").to_list() == PAIRS[1:]
    assert load_records(str(folder), split="train+test[:1]").to_list() == PAIRS


def test_load_records_names_files_of_a_folder_that_it_does_not_read(tmp_path, caplog):
    write(tmp_path / "folder" / "a.jsonl", LINES[0])
    write(tmp_path / "folder" / "b.jsonl", LINES[1])
    Dataset.from_list(PAIRS).to_parquet(tmp_path / "folder" / "c.parquet")
    assert load_records(str(tmp_path / "folder")).to_list() == PAIRS
    assert "folder: not read are c.parquet" in caplog.text


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
        ("a.jsonl", LINES[0] + ",\n" + LINES[1], r'line 1: malformed JSON \(Extra data\) near .*"No\."},'),
        ("a.jsonl", LINES[0] + '\n{"prompt": "a", "prompt": "b"}', r"line 2: .*the key 'prompt' is there twice"),
        ("a.jsonl", LINES[0] + "\nnull", r"line 2: a record is an object.*this is null"),
        ("a.jsonl", LINES[0] + '\n{"a": ' + "[" * 300 + "]" * 300 + "}", "line 2: .*nested too deeply, more than 200"),
        ("a.jsonl", LINES[0] + '\n{"a": ' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}", "line 2: .*nested too deeply"),
        ("a.json", "[" + LINES[0] + ", 5]", r"a\.json, record 2: a record is an object.*this is 5"),
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


ENCODED = LINES[0].encode() + b"\n" + json.dumps(PAIRS[1], ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", ENCODED.replace("ï".encode(), b"\xef"), r"a\.jsonl, line 2: the byte 0xef is not UTF-8"),
        (
            "a.json",
            b"[\n" + ENCODED.replace(b"\n", b",\n").replace("ï".encode(), b"\xef") + b"]",
            "line 3: the byte 0xef",
        ),
        ("a.jsonl", "\n".join(LINES).encode("utf-16"), "line 1: the byte 0xff is not UTF-8; save the file as UTF-8"),
        (
            "a.jsonl.gz",
            gzip.compress((ENCODED + b"\n") * 100)[:-20],
            r"a\.jsonl\.gz cannot be read: Compressed file ended",
        ),
        ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 20, r"a\.jsonl\.gz cannot be read"),
    ],
)
def test_load_records_names_a_file_of_other_bytes(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_records(str(tmp_path / name))


def test_load_records_tells_gzip_by_its_bytes(tmp_path):
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(ENCODED))
    (tmp_path / "plain.jsonl.gz").write_bytes(ENCODED)
    for name in ("packed.jsonl", "plain.jsonl.gz"):
        assert load_records(str(tmp_path / name)).to_list() == PAIRS


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
