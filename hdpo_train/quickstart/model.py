"""The policy of the quickstart: a small Llama with a tokenizer of its own, taught by demonstrations."""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has tokens; in practice one a word."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def new_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, max_length: int, seed: int
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def teach(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    demonstrate: Callable[[str, random.Random], str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Supervised fine-tuning on fresh demonstrations of (prompt, rng): cross-entropy on the answers' tokens."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    progress = tqdm(range(steps), desc="SFT", unit="step", leave=False)
    for _ in progress:
        chosen = rng.choices(prompts, k=batch_size)
        texts = [prompt + demonstrate(prompt, rng) + str(tokenizer.eos_token) for prompt in chosen]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        starts = torch.tensor([len(ids) for ids in tokenizer(chosen)["input_ids"]])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels = labels.masked_fill(torch.arange(labels.shape[1]) < starts.unsqueeze(1), -100)
        batch, labels = batch.to(model.device), labels.to(model.device)
        logits = model(**batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
