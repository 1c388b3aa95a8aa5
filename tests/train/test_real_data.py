"""A few steps on real records: GSM8K solutions, and multi-turn dialogues of up to thousands of tokens."""

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hdpo_train import HDPOTrainer
from hdpo_train.data.tokenize import load_records
from hdpo_train.run.report import read_metrics

FOLDER = Path(__file__).parents[3] / "shared" / "data"


def tokenizer_for(records: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((record["prompt"] + record["chosen"] for record in records), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


@pytest.mark.parametrize(
    ("name", "records", "max_length"), [("gsm8k_preferences", 48, 512), ("hh_harmless_preferences", 16, 4096)]
)
def test_train_on_real_records_loss_falls(name, records, max_length, config):
    path = FOLDER / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"real records are not here: {path.name} is looked for in shared/data beside the project")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        head = [json.loads(next(file)) for _ in range(200)]
    longest = sorted(range(200), key=lambda i: -len(head[i]["prompt"]))[:2]
    dataset = load_records(str(path)).select([*longest, *(i for i in range(records) if i not in longest)])
    set_seed(0)
    size = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=max_length, **size))
    epochs, batch = 3, 8
    args = config(
        alpha=0.95, beta=0.1, max_length=max_length, per_device_train_batch_size=batch, max_steps=-1,
        num_train_epochs=epochs, learning_rate=1e-3, precompute_ref_batch_size=4, lr_scheduler_type="linear",
    )  # fmt: skip
    HDPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer_for(head)).train()
    losses = [line["loss"] for line in read_metrics(args.output_dir) if "loss" in line]
    per_epoch = len(losses) // epochs
    assert sum(losses[-per_epoch:]) < 0.9 * sum(losses[:per_epoch])  # the same pairs, two epochs later; NaN fails too
