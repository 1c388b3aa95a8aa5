"""hdpo-train pairs in this process: records to train on, a summary, going on, and messages a person can act on."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hdpo_train.cli import judging as problems
from hdpo_train.cli.main import main
from hdpo_train.data.tokenize import load_records, tokenize_pairs
from hdpo_train.evaluation import sampler as generate
from hdpo_train.evaluation.scores import from_json
from tests.train.commands import refused, write
from tests.train.tiny import make_chain

TEMPLATE = (
    "{% if tools %}tools{% endif %}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPTS = [{"prompt": f"{i}. Say sun:", "answer": "sun"} for i in range(6)]
CHATS = [{"prompt": [{"role": "user", "content": f"{i}. Say sun"}], "answer": "sun"} for i in range(6)]
WORDS = [" sun", " moon", " rain", " snow"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """Says sun or another word after a colon; then it ends, or says more words; one answer in ten does not end."""
    folder = tmp_path_factory.mktemp("pairs") / "model"
    colon, *words, never = (tokenizer(text)["input_ids"][0] for text in [":", *WORDS, " wind"])
    end = tokenizer.eos_token_id
    after = {word: {end: 0.7, **{other: 0.3 / 4 for other in words}} for word in words}
    start = {words[0]: 0.5, words[1]: 0.2, words[2]: 0.1, words[3]: 0.1, never: 0.1}
    make_chain({colon: start, never: {never: 1.0}, **after}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "prompts.jsonl", PROMPTS)
    write(tmp_path / "chats.jsonl", CHATS)
    texts = [*(" sun" * n for n in range(1, 9)), *(" moon" * n for n in range(1, 19, 2))]
    write(tmp_path / "vllm.jsonl", [{"prompt": each["prompt"], "completions": texts} for each in PROMPTS])
    return tmp_path


def words(**options) -> list[str]:
    values = {"prompts": "prompts.jsonl", "checker": "regex:^ sun$", "output": "pairs.jsonl", **options}
    if "samples" not in options:
        values = {"num_samples": 8, "max_new_tokens": 6, "batch_size": 12, **values}
    listed = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return ["pairs", *(word for name, value in listed.items() for word in (f"--{name}", *map(str, value)))]


def read(name: str = "pairs.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def summary(name: str = "pairs.summary.json") -> dict:
    return json.loads(Path(name).read_text(encoding="utf-8"))


def test_pairs_of_a_model_are_its_right_and_wrong_answers_with_a_summary(model, folder, capsys):
    main(words(model_name_or_path=model))
    printed, found, records = capsys.readouterr().out, summary(), read()
    assert {path.name for path in folder.glob("pairs*")} == {"pairs.jsonl", "pairs.samples.jsonl", "pairs.summary.json"}
    assert all(
        each["chosen"] == " sun" != each["rejected"] and set(each) == {"prompt", "chosen", "rejected"}
        for each in records
    )
    samples = found["samples"]
    assert samples["cut"] and samples["repeated"] and sum(samples.values()) == 2 * samples["all"] == 96
    assert found["prompts"]["with a pair"] == len(records) == len({each["prompt"] for each in records}) > 3
    assert f"{len(records)} pairs of {len(records)} prompts" in printed and "not ended within max_new_tokens" in printed
    lengths = found["lengths"]
    assert lengths["chosen"] == {"mean": 2.0, "quartiles": [2.0, 2.0, 2.0]} and found["unit of lengths"] == "tokens"
    assert lengths["rejected"]["mean"] > 2 and "Tokens: chosen 2.0 on average" in printed


@pytest.mark.parametrize("prompts", ["prompts.jsonl", "chats.jsonl"])
def test_pairs_are_trained_on_with_the_tokens_that_were_sampled(prompts, model, folder, monkeypatch):
    drawn, complete = set(), generate.complete

    def noted(model, prompts, *args, **kwargs):
        completions = complete(model, prompts, *args, **kwargs)
        drawn.update((tuple(prompt), tuple(each)) for prompt, each in zip(prompts, completions, strict=True))
        return completions

    monkeypatch.setattr(generate, "complete", noted)
    main(words(model_name_or_path=model, prompts=prompts))
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = tokenize_pairs(load_records("pairs.jsonl"), tokenizer)
    for row in rows:
        for name in ("chosen_ids", "rejected_ids"):
            assert (tuple(row["prompt_ids"]), tuple(row[name])) in drawn and row[name][-1] == tokenizer.eos_token_id
    assert len(rows) > 3


def test_pairs_of_chats_are_messages_and_keep_what_the_template_reads(model, folder):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"x": None}}}]
    write(folder / "chats.jsonl", [{**each, "tools": tools, "id": 7} for each in CHATS])
    main(words(model_name_or_path=model, prompts="chats.jsonl"))
    for record in read():
        assert (
            record["prompt"] in [each["prompt"] for each in CHATS] and record["tools"] == tools and "id" not in record
        )
        assert record["chosen"] == [{"role": "assistant", "content": " sun"}] != record["rejected"]


def test_pairs_refuses_chats_that_cannot_be_trained_on_before_the_model_is_loaded(model, folder, capsys, tokenizer):
    (folder / "other").mkdir()
    tokenizer.save_pretrained(folder / "other")
    (folder / "other" / "config.json").write_text((model / "config.json").read_text())
    thinking = TEMPLATE.replace("assistant:{% endif %}", "assistant:<think>{% endif %}")
    (folder / "other" / "chat_template.jinja").write_text(thinking)
    message = refused(words(model_name_or_path="other", prompts="chats.jsonl"), capsys)
    assert "prompt 1: no pair of it could be trained on" in message and "writes the prompt differently" in message


def test_pairs_goes_on_where_it_was_killed_and_ends_with_the_same_pairs(model, folder, monkeypatch):
    main(words(model_name_or_path=model))
    files = {path.name: path.read_bytes() for path in folder.glob("pairs*")}
    for left in (0.0, 0.4, 0.9):  # of the samples' bytes
        (folder / "pairs.jsonl").unlink()
        (folder / "pairs.samples.jsonl").write_bytes(
            files["pairs.samples.jsonl"][: int(left * len(files["pairs.samples.jsonl"]))]
        )
        main(words(model_name_or_path=model))
        assert {path.name: path.read_bytes() for path in folder.glob("pairs*")} == files
    monkeypatch.setattr(problems, "load_model", lambda *_: pytest.fail("loaded a model"))
    main(words(model_name_or_path=model))
    assert {path.name: path.read_bytes() for path in folder.glob("pairs*")} == files


def test_pairs_interrupted_says_what_to_do(model, folder, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        draw, calls = generate.Sampler._draw, iter(range(9))

        def interrupted(sampler, *args):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return draw(sampler, *args)

        patched.setattr(generate.Sampler, "_draw", interrupted)
        with pytest.raises(SystemExit, match="130"):
            main(words(model_name_or_path=model))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("pairs.samples.jsonl has what is drawn, and the same command goes on from there")
    assert len(read("pairs.samples.jsonl")) == 1 + 2 * 12 and not (folder / "pairs.jsonl").exists()


def test_pairs_of_ready_made_samples_are_few_of_a_prompt_and_depend_on_the_seed(folder):
    found = []
    for number, options in enumerate([{}, {}, {"seed": 1}, {"pairs_per_prompt": 1}]):
        main(words(samples="vllm.jsonl", checker="regex:sun$", output=f"{number}.jsonl", **options))
        found.append(read(f"{number}.jsonl"))
    first, again, other_seed, one = found
    assert first == again != other_seed and len(first) == 12 and len(one) == 6
    assert summary("0.summary.json")["unit of lengths"] == "characters" and not list(folder.glob("*.samples.jsonl"))


def test_pairs_of_the_samples_of_this_command_are_the_same(model, folder):
    main(words(model_name_or_path=model))
    main(words(samples="pairs.samples.jsonl", output="again.jsonl"))
    assert read("again.jsonl") == read() and summary("again.summary.json")["lengths"] == summary()["lengths"]


def test_pairs_match_lengths_shows_them_before_and_after(folder, capsys):
    main(words(samples="vllm.jsonl", checker="regex:sun$", output="free.jsonl"))
    assert "Without --match_lengths" not in capsys.readouterr().out
    main(words(samples="vllm.jsonl", checker="regex:sun$", match_lengths=[0.2]))
    printed, found = capsys.readouterr().out, summary()
    assert found["lengths without matching"] == summary("free.summary.json")["lengths"] != found["lengths"]
    assert "Without --match_lengths: chosen" in printed
    for record in read():
        lengths = [len(record[name]) for name in ("chosen", "rejected")]
        assert max(lengths) - min(lengths) <= 0.2 * max(lengths)


def test_pairs_of_very_unequal_lengths_are_warned_of(folder, capsys):
    write(folder / "vllm.jsonl", [{"prompt": 0, "completions": ["sun", "moon " * 9]}])
    main(words(samples="vllm.jsonl", checker="regex:sun"))
    assert "Rejected answers are 15 times as long as the others" in capsys.readouterr().out


def test_pairs_leaves_out_and_names_what_could_not_be_judged(folder, capsys):
    checks = "def check(prompt, completion, record):\n    return {'sun': True, 'moon': False}[completion]\n"
    (folder / "checks.py").write_text(checks)
    write(folder / "vllm.jsonl", [{"prompt": i, "completions": ["sun", "moon", "rain"]} for i in range(6)])
    main([*words(samples="vllm.jsonl", checker="checks.py:check"), "--checker_timeout", "5"])
    assert {each["rejected"] for each in read()} == {"moon"}
    assert summary()["unjudged"] == {"the checker raised KeyError": 6} and summary()["samples"]["unjudged"] == 6
    assert "6 × the checker raised KeyError" in capsys.readouterr().out


def test_pairs_does_not_overwrite_pairs_of_another_command(folder, capsys):
    options = {"samples": "vllm.jsonl", "checker": "regex:sun$"}
    main(words(**options))
    before = Path("pairs.jsonl").read_bytes()
    message = refused(words(**options, seed=1), capsys)
    assert "was made with seed = 0, this call has seed = 1: choose another --output, or delete" in message
    Path("pairs.summary.json").unlink()
    assert "no pairs.summary.json says how it was made" in refused(words(**options), capsys)
    assert "no prompts.summary.json says" in refused(words(**options, output="prompts.jsonl"), capsys)
    assert Path("pairs.jsonl").read_bytes() == before and read("prompts.jsonl") == PROMPTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of the arguments --model_name_or_path --samples is required"),
        ({"samples": "vllm.jsonl", "num_samples": 4}, "--num_samples has no effect on ready-made samples"),
        ({"samples": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"samples": "vllm.jsonl", "output": "pairs.json"}, "whose name ends in .jsonl, got pairs.json"),
        ({"samples": "vllm.jsonl", "pairs_per_prompt": 0}, "--pairs_per_prompt must be at least 1, got 0"),
        ({"samples": "vllm.jsonl", "match_lengths": 20}, "takes a share from 0 to 1, or nothing, got 20"),
        ({"model_name_or_path": "m", "num_samples": 1}, "--num_samples must be at least 2"),
        ({"model_name_or_path": "m", "temperature": 0}, "--temperature must be above 0, got 0"),
        ({"model_name_or_path": "m", "checker": "gsm8k"}, "no number in its 'answer'"),
        ({"samples": "vllm.jsonl", "checker": "regex:x"}, "6 have wrong ones only, 0 right ones only. Draw more"),
        ({"samples": "vllm.jsonl", "checker": "regex:sun$", "match_lengths": 0}, "give --match_lengths a larger share"),
    ],
)  # fmt: skip
def test_pairs_refuses_with_the_value_and_the_way_out(options, message, folder, capsys):
    assert message in refused(words(**options), capsys)
    assert not (folder / "pairs.jsonl").exists()


def test_pairs_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["pairs", "--help"])
    text = capsys.readouterr().out
    for word in ("--match_lengths", "--pairs_per_prompt", "gsm8k", "vllm.jsonl", "goes on where it was"):
        assert word in text


def test_pairs_then_train_then_eval_makes_a_model_better(model, folder):
    main(words(model_name_or_path=model, num_samples=16, pairs_per_prompt=4))
    common = ["--model_name_or_path", str(model)]
    run = ["--dataset_name", "pairs.jsonl", "--output_dir", "out", "--ref_cache_dir", "reference", "--use_cpu", "true"]
    main([*common, *run, "--max_steps", "8", "--learning_rate", "0.003", "--disable_tqdm", "true", "--beta", "0.5"])
    evaluation = ["--checker", "regex:^ sun$", "--max_new_tokens", "6", "--num_samples", "32", "--output_dir", "eval"]
    main(["eval", *common, "out", "--prompts", "prompts.jsonl", *evaluation, "--no_self_bleu"])
    results = (folder / "eval" / "results.json").read_text()
    accuracies = [from_json(each).sampled[1.0].accuracy for each in json.loads(results)]
    assert accuracies[1].low > accuracies[0].high
