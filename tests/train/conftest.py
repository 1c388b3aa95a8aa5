"""Fixtures of the trainer's tests: a tiny tokenizer, model and records, and a config for short runs."""

import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hdpo_train import HDPOConfig
from tests.train.tiny import VOCAB, make_model, make_records


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet)
    bpe.train_from_iterator((" ".join(r.values()) for r in make_records(200)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def records():
    return make_records()


@pytest.fixture
def config(tmp_path: Path):
    """HDPOConfig for a short run in an empty folder on the CPU, silent."""

    def make(**options) -> HDPOConfig:
        defaults = dict(
            output_dir=str(tmp_path / "out"), ref_cache_dir=str(tmp_path / "reference"), use_cpu=True, seed=0,
            per_device_train_batch_size=4, max_steps=4, logging_steps=1, learning_rate=1e-3, save_strategy="no",
            disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        return HDPOConfig(**{**defaults, **options})

    return make


@pytest.fixture
def library_log(caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("transformers").removeHandler(caplog.handler)
