"""The file of samples: killed at any byte, of other settings, edited; and samples of other engines."""

import gzip
import json
import re

import pytest

from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.samples import Request, Sample, SamplesFile, before_stop, digest, read_samples

HEADER = {"name": "é", "model": "abc", "seed": 0}
BATCHES = [[Request(p, 1.0, i) for i in range(2)] for p in range(3)]
PROBLEMS = [Problem("2 + 2?", {}), Problem([{"role": "user", "content": "hé"}], {}), Problem("again", {})]


def draw(batch):
    return [Sample(*request, f"a\u2028ß\n{request.prompt}", 3, 0.1 + request.number, True) for request in batch]


def fill(path):
    """What a run does: whatever is missing."""
    file = SamplesFile(path, HEADER, BATCHES)
    for batch in BATCHES[file.num_batches :]:
        file.append(draw(batch))
    return SamplesFile(path, HEADER, BATCHES).samples


def test_samples_file_killed_at_any_byte_ends_with_the_same_bytes(tmp_path):
    path = tmp_path / "new" / "samples.jsonl"
    samples = fill(path)
    assert samples == [sample for batch in BATCHES for sample in draw(batch)]
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        before = SamplesFile(path, HEADER, BATCHES)
        assert path.read_bytes() == whole[:size]  # looking changes nothing
        assert before.samples == samples[: 2 * before.num_batches]
        assert fill(path) == samples and path.read_bytes() == whole
    assert before.num_batches == 3


@pytest.mark.parametrize("key", ["model", "seed"])
def test_samples_file_of_other_settings_is_refused_and_kept(key, tmp_path):
    path = tmp_path / "samples.jsonl"
    fill(path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{key} = {HEADER[key]}, this call has {key} = 7"):
        SamplesFile(path, {**HEADER, key: 7}, BATCHES)
    assert path.read_bytes() == whole
    assert SamplesFile(path, {**HEADER, "name": "of another folder"}, BATCHES).num_batches == 3


@pytest.mark.parametrize("content", ["precious\n", "precious", '{"format": "x"}\n', "[1]\n"])
def test_samples_file_refuses_what_is_none(content, tmp_path):
    (tmp_path / "thesis.tex").write_text(content)
    with pytest.raises(ValueError, match="not a file of samples"):
        SamplesFile(tmp_path / "thesis.tex", HEADER, BATCHES)
    assert (tmp_path / "thesis.tex").read_text() == content


def test_samples_file_refuses_what_was_edited(tmp_path):
    path = tmp_path / "samples.jsonl"
    fill(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    for edited, message in (
        ([lines[0], lines[2], lines[1], *lines[3:]], "should be is Request"),
        ([lines[0], "nonsense", *lines[2:]], "is no sample"),
        ([*lines[:-1], lines[-2], ""], "7 samples, 6 were asked for"),
    ):
        path.write_text("\n".join(edited), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            SamplesFile(path, HEADER, BATCHES)


def test_read_samples_takes_texts_messages_and_numbers(tmp_path):
    records = [
        {"prompt": PROBLEMS[0].prompt, "completions": ["4", "5"], "engine": "x"},
        {"prompt": PROBLEMS[1].prompt, "completion": "ho", "temperature": 0},
        {"prompt": 0, "completion": "6", "entropy": 5.0},
    ]
    path = tmp_path / "samples.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n\n".join(json.dumps(record) for record in records))
    expected = [Sample(0, 1.0, 0, "4"), Sample(0, 1.0, 1, "5"), Sample(1, 0.0, 0, "ho"), Sample(0, 1.0, 2, "6")]
    assert read_samples(path, PROBLEMS) == expected


def test_read_samples_takes_a_file_of_our_own_with_its_entropies(tmp_path):
    header = {**HEADER, "prompts": digest([problem.prompt for problem in PROBLEMS])}
    file = SamplesFile(tmp_path / "samples.jsonl", header, BATCHES)
    for batch in BATCHES:
        file.append(draw(batch))
    assert read_samples(file.path, PROBLEMS) == [sample for batch in BATCHES for sample in draw(batch)]
    with pytest.raises(ValueError, match="line 1: these are samples of other prompts"):
        read_samples(file.path, PROBLEMS[:2])


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("12\nQ: and", ["\nQ:"], "12"),
        ("12\nQ: and\nQ: more", ["\nQ:", "and"], "12"),
        ("abcd", ["abcd", "bc"], "a"),  # "bc" is complete when "abcd" is not yet
        ("abcd", ["bcd", "cd"], "a"),  # complete at once: the one that began first
        ("abcd", ["x", "dd"], "abcd"),
        ("abcd", [], "abcd"),
        ("ab", ["a"], ""),
    ],
)
def test_before_stop(text, stop, kept):
    assert before_stop(text, stop) == kept


def test_read_samples_with_stop_cuts_and_forgets_what_no_longer_holds(tmp_path):
    file = SamplesFile(tmp_path / "samples.jsonl", {**HEADER, "prompts": digest([p.prompt for p in PROBLEMS])}, BATCHES)
    for number, batch in enumerate(BATCHES):
        file.append([Sample(*request, f"7{'; Q' * number}", 3, 0.5, False) for request in batch])
    samples = read_samples(file.path, PROBLEMS, stop=["Q", "; Q"])
    assert {s.completion for s in samples} == {"7"}
    assert [tuple(s[4:]) for s in samples] == [(3, 0.5, False)] * 2 + [(None, None, True)] * 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: Expecting value"),
        ("[]", "line 2: "),
        ('{"completion": "x"}', 'a line needs "prompt"'),
        ('{"prompt": 0}', 'either "completion" or "completions"'),
        ('{"prompt": 0, "completion": null}', "must be a string"),
        ('{"prompt": 0, "completions": "abc"}', "a list of strings"),
        ('{"prompt": 0, "completion": "x", "temperature": -1}', "temperature must be a number from 0 on, got -1"),
        ('{"prompt": 0, "completion": "x", "temperature": NaN}', "temperature must be"),
        ('{"prompt": 0, "completion": "x", "temperature": true}', "temperature must be a number from 0 on, got True"),
        ('{"prompt": true, "completion": "x"}', "the prompt 'True' is not in the file"),
        ('{"prompt": 0.0, "completion": "x"}', "the prompt '0.0' is not in the file"),
        ('{"prompt": {"a": [1]}, "completion": "x"}', "is not in the file"),
        ("[" * 100_000, "line 2: "),
        ('{"prompt": 3, "completion": "x"}', "the prompt '3' is not in the file of 3 prompts"),
        ('{"prompt": "other", "completion": "x"}', "the prompt 'other' is not in the file"),
    ],
)
def test_read_samples_names_the_line(line, message, tmp_path):
    (tmp_path / "samples.jsonl").write_text(f'{{"prompt": 0, "completion": ""}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / "samples.jsonl", PROBLEMS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_tokens", "3"), ("num_tokens", 2.5), ("num_tokens", True), ("entropy", "low"), ("entropy", float("nan")),
        ("entropy", [1]), ("ended", 1), ("ended", "yes"), ("completion", 5), ("completion", None),
    ],
)  # fmt: skip
def test_samples_of_our_own_with_a_value_of_another_type_are_refused(name, value, tmp_path):
    header = {**HEADER, "prompts": digest([problem.prompt for problem in PROBLEMS])}
    file = SamplesFile(tmp_path / "samples.jsonl", header, BATCHES)
    for batch in BATCHES:
        file.append(draw(batch))
    lines = file.path.read_text(encoding="utf-8").split("\n")
    lines[3] = json.dumps({**json.loads(lines[3]), name: value})
    file.path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=f"line 4: .*{name}"):
        read_samples(file.path, PROBLEMS)
    with pytest.raises(ValueError, match=f"is no sample \\({name} must be "):
        SamplesFile(file.path, header, BATCHES)


def test_read_samples_refuses_a_torn_archive_and_a_header_without_prompts(tmp_path):
    path = tmp_path / "samples.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": 0, "completion": "x"}\n' * 99)[:-12])
    with pytest.raises(ValueError, match=r"samples.jsonl.gz is damaged: "):
        read_samples(path, PROBLEMS)
    path.write_bytes(gzip.compress(b'{"format": "hdpo samples 1"}\n'))
    with pytest.raises(ValueError, match="line 1: these are samples of other prompts"):
        read_samples(path, PROBLEMS)


def test_read_samples_refuses_ambiguous_prompts_and_empty_files(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"prompt": "again", "completion": "x"}\n')
    with pytest.raises(ValueError, match="2 times: name it by its number"):
        read_samples(path, [*PROBLEMS, PROBLEMS[2]])
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no sample"):
        read_samples(path, PROBLEMS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"num_tokens": "3"}, "num_tokens must be int or None, got '3'"),
        ({"entropy": [1]}, "entropy must be int or float or None, got [1]"),
        ({"ended": "yes"}, "ended must be bool or None, got 'yes'"),
        ({"completion": 5}, "a completion must be a string"),
        ({"prompt": True}, "the prompt 'True' is not in the file"),
        ({"temperature": True}, "temperature must be a number from 0 on, got True"),
        ({"prompt": None}, "the prompt 'None' is not in the file"),
    ],
)
def test_read_samples_names_the_line_of_a_wrong_type_in_its_own_file(tmp_path, line, words):
    header = {"format": "hdpo samples 1", "prompts": digest([problem.prompt for problem in PROBLEMS])}
    path = tmp_path / "samples.jsonl"
    sample = Sample(0, 1.0, 0, "four", 3, 0.5, True)._asdict()
    path.write_text("".join(json.dumps(each) + "\n" for each in (header, sample, sample | line)))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {words}")):
        read_samples(path, PROBLEMS)


@pytest.mark.parametrize("content", ["[]", "3", '{"format": "hdpo samples 1"}', "[" * 100_000, '{"prompt": 0'])
def test_read_samples_names_the_line_that_is_no_record(tmp_path, content):
    path = tmp_path / "samples.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 1: ")):
        read_samples(path, PROBLEMS)


def test_read_samples_of_a_damaged_gzip_file(tmp_path):
    path = tmp_path / "samples.jsonl.gz"
    whole = gzip.compress(json.dumps({"prompt": 0, "completion": "x" * 1000}).encode() * 100)
    for damaged in (whole[:-20], whole[:30] + b"garbage" + whole[37:], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"samples\.jsonl\.gz is damaged"):
            read_samples(path, PROBLEMS)
