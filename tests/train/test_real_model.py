"""A real pretrained model, SmolLM2-135M from a GGUF file: saved as an ordinary one, and trained as TRL trains it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real import data, training
from benchmarks.table import installed
from benchmarks.train_step import OURS, TRL
from hdpo_train.model.loading import load_model, load_tokenizer

pytestmark = pytest.mark.skipif(bool(data.missing()), reason=data.missing())


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("system", "user"), texts, strict=True)]


def test_model_of_the_gguf_file_is_saved_as_an_ordinary_one():
    name, folder = str(data.gguf_file()), data.model_folder()
    ordinary, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = messages("Be brief.", "What is the capital of France?")
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert text == load_tokenizer(name).apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(ordinary(ids).logits, load_model(name)(ids).logits)
        answer = ordinary.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
def test_the_trajectory_of_a_real_model_is_that_of_trl():
    words = ("red", "blue", "a dog", "seven", "the sea")
    records = [
        {
            "prompt": messages("Be brief.", f"Say {word}."),
            "chosen": [{"role": "assistant", "content": word}],
            "rejected": [{"role": "assistant", "content": f"I will not say {word}, sorry."}],
        }
        for word in words
    ]
    work = training.Work("trajectory", "words", records, pairs=1, steps=len(words))
    (ours, ours_after), (theirs, theirs_after) = (
        training.train(name, data.model_folder(), work) for name in (OURS, TRL)
    )
    assert ours.losses == pytest.approx(theirs.losses, abs=5e-6)  # measured: 8e-7
    assert min(ours.losses) < 0.6
    differences = (a - b for a, b in zip(ours_after, theirs_after, strict=True))
    assert max(each.abs().max().item() for each in differences) < 1e-5  # measured: 2e-6
