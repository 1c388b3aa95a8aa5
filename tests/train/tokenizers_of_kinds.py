"""Tokenizers of several kinds, trained on the spot, and short ways to write records for them."""

import functools
import json

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hdpo_train.data.tokenize import tokenize_pairs

IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Hello world, what is the answer? The answer is 42.",
    "Question: how many eggs are there?\nAnswer: there are 12 eggs, then 3 more.",
    "them these there their theme\n\nfoo bar ... and so on: (a) b; c!",
    "user\nassistant\nsystem\nYou are a helpful assistant.",
] * 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def wrap(backend, **kwargs):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", **{"bos_token": "<s>", **kwargs}
    )


def with_specials(backend, bos=True, eos=False):
    single = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=" ".join(single), special_tokens=ids)
    return backend


def byte_level(corpus=CORPUS, vocab_size=400, prefix=False, normalizer=None):
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return backend


def metaspace(scheme="first", split=False):
    """Sentencepiece-like unigram model, a space put before every text."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    alphabet = sorted(set("".join(CORPUS)) | {"▁"})
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def llama_2():
    """BPE over whole texts with a normalizer that puts a space before each, bytes for what it does not know."""
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    pieces.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False))
    model = json.loads(pieces.to_str())["model"]
    vocab = {**model["vocab"], **{f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = pieces.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@functools.cache
def tokenizers_of_kinds():
    return {
        "byte-level": wrap(byte_level()),
        "byte-level, BOS": wrap(with_specials(byte_level())),
        "byte-level, BOS, EOS": wrap(with_specials(byte_level(), eos=True)),
        "byte-level, prefix": wrap(byte_level(prefix=True)),
        "byte-level, NFC": wrap(with_specials(byte_level(normalizer=normalizers.NFC()))),
        "metaspace": wrap(with_specials(metaspace())),
        "metaspace, BOS, EOS": wrap(with_specials(metaspace(), eos=True)),
        "metaspace, always": wrap(with_specials(metaspace("always", split=True))),
        "llama-2": wrap(with_specials(llama_2())),
    }


KINDS = [
    "byte-level",
    "byte-level, BOS",
    "byte-level, BOS, EOS",
    "byte-level, prefix",
    "byte-level, NFC",
    "metaspace",
    "metaspace, BOS, EOS",
    "metaspace, always",
    "llama-2",
]


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokenize(records, tokenizer, **kwargs):
    return tokenize_pairs(Dataset.from_list(records), tokenizer, **{"max_length": None, **kwargs})


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}
