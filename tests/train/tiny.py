"""Tiny random models of several families, and preference records made on the spot."""

import math
import random

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

VOCAB = 300
_SIZE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
_KV = dict(num_key_value_heads=1, max_position_embeddings=256)
_IDS = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE, **_KV, **_IDS)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE, **_KV, **_IDS, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZE, **_KV, **_IDS, head_dim=16, final_logit_softcapping=5.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_SIZE, **_KV, **_IDS, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_SIZE, **_KV, **_IDS, logits_scaling=3.0)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_SIZE, **_IDS, max_position_embeddings=256)),  # a head with a bias
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=256)),
}


def make_model(family: str = "llama", seed: int = 0, spread: float = 5.0):
    """A random model; `spread` scales its head so that log-probs are far from uniform."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_output_embeddings().weight.mul_(spread)
    return model.eval()


def make_chain(transitions: dict[int, dict[int, float]]):
    """A Llama whose next token depends on the last one only: transitions[last][next] is its probability.

    Embeddings are one-hot, and the one layer adds nothing: the head sees √V · one-hot(last).
    """
    config = LlamaConfig(**{**_SIZE, **_KV, **_IDS, "hidden_size": VOCAB, "num_hidden_layers": 1})
    model = LlamaForCausalLM(config)
    logits = torch.full((VOCAB, VOCAB), -60.0)  # next, last
    for last, following in transitions.items():
        for token, probability in following.items():
            logits[token, last] = math.log(probability)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(30 * torch.eye(VOCAB))  # large beside the norm's ε
        model.lm_head.weight.copy_(logits / VOCAB**0.5)
    return model.eval()


def make_records(n: int = 12, seed: int = 0) -> list[dict[str, str]]:
    """Prompts that ask for a word; the chosen answer is that word, the rejected one others. Ragged lengths."""
    rng = random.Random(seed)
    words = ["sun", "moon", "star", "cloud", "rain", "snow", "wind", "river", "stone", "tree"]
    records = []
    for i in range(n):
        word = rng.choice(words)
        wrong = " ".join(rng.choice([w for w in words if w != word]) for _ in range(rng.randint(1, 5)))
        records.append({"prompt": f"{i}. Say {word}:", "chosen": f" {word}", "rejected": f" {wrong}"})
    return records


class Elsewhere:
    """In place of `save_on_cpu`: what is saved goes to NumPy's memory, as from a device to the host."""

    def __init__(self):
        self.nbytes = 0

    def __call__(self, **kwargs):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda array: torch.from_numpy(array).clone())

    def pack(self, tensor):
        self.nbytes += tensor.nbytes
        return tensor.detach().numpy().copy()
