"""Packed batches and shared prompts: the same loss and gradients as padded batches, or a refusal; the token budget."""

import functools
import os
import random
import subprocess
import sys
import types
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GptOssConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)
from transformers import AutoModelForCausalLM as Auto
from transformers.models.llama.modeling_llama import eager_attention_forward

from hdpo_kernels import naive
from hdpo_train.data.sampler import TokenBudgetSampler
from hdpo_train.data.tokenize import PairCollator
from hdpo_train.model import attention, packing
from hdpo_train.model.head import attach_loss, model_inputs
from hdpo_train.model.packing import PADDED, Layout, find_layout, lay_out, use_layout
from hdpo_train.run.report import read_metrics
from tests.train.tiny import FAMILIES, VOCAB, make_model, make_records

WINDOW = 5
SIZE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
KV = dict(num_key_value_heads=1, head_dim=16, max_position_embeddings=256, pad_token_id=0)
EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.0)
MODELS = {
    **{family: FAMILIES[family] for family in ("llama", "llama-tied", "gpt2")},
    "qwen3": lambda: Auto.from_config(Qwen3Config(**SIZE, **KV)),
    "qwen3-sliding": lambda: Auto.from_config(
        Qwen3Config(**SIZE, **KV, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "mistral": lambda: Auto.from_config(MistralConfig(**SIZE, **KV, sliding_window=WINDOW)),
    "gemma2": lambda: Auto.from_config(
        Gemma2Config(**SIZE, **KV, sliding_window=WINDOW, final_logit_softcapping=5.0, attn_logit_softcapping=3.0)
    ),
    "gemma3": lambda: Auto.from_config(Gemma3TextConfig(**SIZE, **KV, sliding_window=WINDOW)),
    "gpt-oss": lambda: Auto.from_config(
        GptOssConfig(**SIZE, **KV, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)
    ),
    "mixtral": lambda: Auto.from_config(MixtralConfig(**SIZE, **KV, **EXPERTS, num_local_experts=4)),
    "qwen2-moe": lambda: Auto.from_config(
        Qwen2MoeConfig(
            **SIZE, **KV, **EXPERTS, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
        )
    ),
}
PACKED, SHARED = Layout(True), Layout(True, True)
CPU = torch.device("cpu")
LOSS = {"alpha": 0.8, "beta": 0.5}


def make(name, attention="sdpa", **kwargs):
    FAMILIES.setdefault(name, MODELS[name])
    model = make_model(name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention matters: init is nearly linear
            if parameter.dim() == 2:
                parameter.mul_(3)
    if attention == "sdpa" and not model._supports_sdpa:  # scores that are capped, or sinks
        attention = "eager"
    model.set_attn_implementation(attention)
    return model


def make_examples(seed=0, count=4, prompt=(1, 14), completion=(1, 9)):
    generator = random.Random(seed)

    def ids(least, most):
        return [generator.randrange(1, VOCAB) for _ in range(generator.randint(least, most))]

    examples = [
        {"prompt_ids": ids(*prompt), "chosen_ids": ids(*completion), "rejected_ids": ids(*completion)}
        for _ in range(count)
    ]
    for example in examples:
        example |= {f"ref_{side}_logp": generator.uniform(-20, -10) for side in ("chosen", "rejected")}
    return examples


def step(model, examples, layout, autocast=False):
    """The result and the gradients of one batch. The loss has been attached to the model."""
    use_layout(model, layout)
    inputs = model_inputs(PairCollator(VOCAB - 1, layout)(examples), CPU, LOSS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = model(**inputs)
    return result, gradients(model, result.loss)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def step_alone(model, examples):
    """The same from every sequence by itself, through transformers' own forward with its own attention."""
    logits, labels = [], []
    for example in examples:
        for side in ("chosen_ids", "rejected_ids"):
            prompt, completion = example["prompt_ids"], example[side]
            row = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logits, labels = [*logits, row], [*labels, torch.tensor(completion)]
    bounds = [0, *accumulate(map(len, labels))]
    refs = torch.tensor([e[f"ref_{side}_logp"] for e in examples for side in ("chosen", "rejected")])
    result = naive.hdpo_loss(torch.cat(logits), torch.cat(labels), bounds, refs, **LOSS)
    return result, gradients(model, result.loss)


def assert_same_step(one, other, tolerance=2e-4):
    for name, value, truth in zip(one[0]._fields, one[0], other[0], strict=True):
        assert torch.allclose(value, truth, rtol=tolerance, atol=tolerance), (name, value, truth)
    for name, truth in other[1].items():
        assert (one[1][name] - truth).norm() <= 5 * tolerance * truth.norm() + 1e-6, name


def with_loss(name, attention="sdpa"):
    model = make(name, attention)
    attach_loss(model)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_layouts_give_the_loss_and_gradients_of_each_sequence_alone(name, attention):
    model = with_loss(name, attention)
    alone = step_alone(model, make_examples())
    assert find_layout([model]) == SHARED
    for layout in (PADDED, PACKED, SHARED):
        assert_same_step(step(model, make_examples(), layout), alone)


@pytest.mark.parametrize(
    "shape",
    [
        {"prompt": (1, 1)},
        {"completion": (1, 1)},
        {"prompt": (6, 6)},
        {"prompt": (40, 90), "completion": (1, 90)},
        {"count": 1, "prompt": (300, 300), "completion": (1, 3000)},
        {"count": 17, "prompt": (1, 3), "completion": (1, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_layouts_agree_on_any_lengths(name, shape):
    model, examples = with_loss(name), make_examples(1, **shape)
    alone = step_alone(model, examples)
    for layout in (PADDED, PACKED, SHARED):
        assert_same_step(step(model, examples, layout), alone, 5e-4)


@pytest.mark.parametrize("window", [None, 3, 50, 900])
def test_eager_attention_holds_so_many_scores_and_no_more(window, monkeypatch):
    monkeypatch.setattr(attention, "_SCORES", 4000)
    held = []

    def function(module, query, key, value, mask):
        held.append(query.shape[1] * mask.numel())
        return [value[:, :, -query.shape[2] :].transpose(1, 2)]

    rows = torch.zeros(1, 2, 600, 4)
    with torch.no_grad():
        attention._causal_eager(function, window, None, rows, rows, rows)
    assert 2000 < max(held) <= 4000


class Made(TorchDispatchMode):
    """Counts the numbers that operators write."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numbers += sum(each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor))
        return result


def windowed(name, window, monkeypatch):
    """An attention in blocks of 32 queries."""
    monkeypatch.setattr(attention, "_WINDOW_BLOCK", 32)
    monkeypatch.setattr(attention, "_SCORES", 2 * 32 * (32 + window))
    module = types.SimpleNamespace(num_key_value_groups=1, training=False)
    if name == "sdpa":
        return functools.partial(attention._causal_sdpa, window, {"is_causal": True, "scaling": 0.5}, module)
    eager = functools.partial(eager_attention_forward, scaling=0.5)
    return functools.partial(attention._causal_eager, eager, window, module)


def heads(length):
    torch.manual_seed(0)
    return [torch.randn(1, 2, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("window", [3, 32, 100])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_windows_in_blocks_have_the_gradients_of_one_mask(name, window, monkeypatch):
    inputs, weights = heads(300), torch.randn(1, 300, 2, 4, dtype=torch.float64)
    back = torch.arange(300)[:, None] - torch.arange(300)
    whole = F.scaled_dot_product_attention(*inputs, attn_mask=(back >= 0) & (back < window), scale=0.5).transpose(1, 2)
    blocks = windowed(name, window, monkeypatch)(*inputs)
    expected, found = (torch.autograd.grad((out * weights).sum(), inputs) for out in (whole, blocks))
    rounding = 1e-6 if name == "eager" else 1e-14  # its softmax is in fp32; measured: 3e-7 and 7e-16
    for ours, theirs in zip((blocks, *found), (whole, *expected), strict=True):
        assert (ours - theirs).abs().max() < rounding * theirs.abs().max()


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_windows_take_work_linear_in_the_length(name, monkeypatch):
    function, made = windowed(name, 32, monkeypatch), []
    for length in (1024, 2048):
        with Made() as counter:
            function(*heads(length)).sum().backward()
        made.append(counter.numbers)
    assert made[1] < 2.1 * made[0]


def test_shared_prompt_with_gradient_checkpointing():
    model = with_loss("gemma2")
    alone = step_alone(model, make_examples())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        assert_same_step(step(model, make_examples(), SHARED), alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_prompt_in_bf16_autocast(attention):
    model = with_loss("llama", attention)
    padded, shared = (step(model, make_examples(), layout, autocast=True) for layout in (PADDED, SHARED))
    exact = step(model, make_examples(), PADDED)
    error, noise = ((side[0].logps - exact[0].logps).norm() for side in (shared, padded))
    assert error < 2 * noise + 0.05
    name = "model.layers.0.mlp.up_proj.weight"
    error, noise = ((side[1][name] - exact[1][name]).norm() for side in (shared, padded))
    assert error < 2 * noise + 0.01 * exact[1][name].norm()


def test_flex_attention_gets_the_mask_of_sdpa():
    """Its forward: torch 2.13 has no backward of it on a CPU."""
    model, examples = with_loss("gemma2", "sdpa"), make_examples(count=2)
    use_layout(model, SHARED)
    inputs = model_inputs(PairCollator(0, SHARED)(examples), CPU, LOSS)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling takes minutes on a CPU
        expected = model(**inputs)
        model.set_attn_implementation("flex_attention")
        assert find_layout([model]) == SHARED
        result = model(**inputs)
    torch.testing.assert_close(result.logps, expected.logps, rtol=1e-4, atol=1e-4)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_lay_out_small_example():
    pairs = [([1, 2, 3], [4, 5], [6])]
    batch = lay_out(pairs, SHARED, 0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch["rows"].tolist() == [2, 3, 2] and batch["labels"].tensor.tolist() == [4, 5, 6]
    assert batch["cu_seqlens"] == [0, 2, 3] and batch["documents"] == [(3, 2, 1)] and batch["num_tokens"] == 9
    apart = lay_out(pairs, PACKED, 0)
    assert apart["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6]]
    assert apart["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert apart["rows"].tolist() == [2, 3, 7] and apart["documents"] == [(5,), (4,)]
    padded = lay_out(pairs, PADDED, 0)
    assert padded["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]]
    assert padded["rows"].tolist() == [2, 3, 7] and "documents" not in padded


@pytest.mark.parametrize("layout", [PADDED, PACKED, SHARED], ids=str)
def test_lay_out_has_every_token_once_and_no_padding_in_a_packed_row(layout):
    examples = make_examples(count=9)
    pairs = [(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"]) for e in examples]
    batch = lay_out(pairs, layout, 0)  # no token is 0
    tokens = sum(layout.tokens(*map(len, pair)) for pair in pairs) if layout.packed else batch["num_tokens"]
    assert (batch["input_ids"] > 0).sum() == tokens and (not layout.packed or batch["input_ids"].all())
    labels = [token for _, chosen, rejected in pairs for token in (*chosen, *rejected)]
    assert batch["labels"].tensor.tolist() == labels and len(batch["rows"]) == len(labels)


# ---- what cannot be packed -------------------------------------------------------------------------------------------


def recurrent(kind):
    from transformers import BloomConfig, MambaConfig, RecurrentGemmaConfig, RwkvConfig

    configs = {
        "mamba": lambda: MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4),
        "recurrent-gemma": lambda: RecurrentGemmaConfig(**SIZE, num_key_value_heads=1, lru_width=32),
        "rwkv": lambda: RwkvConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16),
        "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2),
    }
    torch.manual_seed(0)
    return Auto.from_config(configs[kind]()).eval()


def varlen(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, scaling=None, **kwargs):
    """FlashAttention's varlen interface in torch: what a row's boundaries keep apart, else plain causal."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    assert max_length_q is None or max_length_q == max(end - start for start, end in pairwise(bounds))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], is_causal=True, scale=scaling
        )
        for start, end in pairwise(bounds)
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def test_flash_attention_gets_the_boundaries_and_shares_no_prompts(library_log, monkeypatch):
    monkeypatch.setattr(packing, "_is_flash", lambda config: "varlen" in config._attn_implementation)
    AttentionInterface.register("varlen_stand_in", varlen)
    model = with_loss("llama")
    padded = step(model, make_examples(), PADDED)
    model.set_attn_implementation("varlen_stand_in")
    assert find_layout([model]) == PACKED
    assert "FlashAttention has no mask to share the prompts" in library_log.text
    assert_same_step(step(model, make_examples(), PACKED), padded)
    with pytest.raises(ValueError, match="varlen_stand_in has no mask to share prompts"):
        find_layout([model], shared_prompt=True)


@pytest.mark.parametrize("kind", ["mamba", "recurrent-gemma", "rwkv", "bloom"])
def test_find_layout_falls_back_or_refuses_where_sequences_are_not_kept_apart(kind, library_log):
    model = recurrent(kind)
    assert find_layout([model]) == PADDED
    assert f"{type(model).__name__} gets padded batches" in library_log.text
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot run packed batches: .*leave out packing"):
        find_layout([model], packing=True)
    assert find_layout([model], packing=False) == PADDED


@pytest.mark.parametrize("window", [5, 30])
def test_find_layout_pads_windows_that_a_model_makes_when_it_is_made(window, library_log):
    """GPT-Neo's masks are of `window_size` places: the probe cannot shorten them."""
    torch.manual_seed(0)
    size = dict(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=2, max_position_embeddings=128)
    model = GPTNeoForCausalLM(GPTNeoConfig(**size, attention_types=[[["global", "local"], 1]], window_size=window))
    assert find_layout([model], longest=60) == PADDED
    assert "GPTNeoForCausalLM gets padded batches" in library_log.text
    attach_loss(model.eval())
    examples = make_examples(prompt=(20, 30), completion=(20, 30))
    assert_same_step(step(model, examples, PADDED), step_alone(model, examples))


def test_find_layout_packs_sliding_windows_longer_than_the_probe():
    model = make("gemma2", "sdpa")
    model.config.sliding_window = 30
    assert find_layout([model], longest=60) == find_layout([model]) == SHARED
    assert model.config.sliding_window == 30


# ---- a budget of tokens ----------------------------------------------------------------------------------------------


def random_lengths(count=200, seed=0):
    generator = random.Random(seed)
    return [round(2 ** generator.uniform(4, 11)) for _ in range(count)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_sampler_takes_every_pair_once_within_the_budget(ranks, padded):
    lengths, epoch = random_lengths(), [0]
    options = dict(max_pairs=24, padded=padded, ranks=ranks, epoch=lambda: epoch[0])
    sampler = TokenBudgetSampler(lengths, 1500, **options)
    seen = []
    for epoch[0] in range(3):
        batches = list(sampler)
        assert len(batches) == len(sampler) and len(batches) % ranks == 0
        assert sorted(pair for batch in batches for pair in batch) == list(range(len(lengths)))
        for batch in batches:
            sizes = [lengths[pair] for pair in batch]
            assert len(batch) == 1 or (max(sizes) * len(sizes) if padded else sum(sizes)) <= 1500
            assert len(batch) <= 24 and max(sizes) < 2 * min(sizes) + 100
        assert batches == list(sampler) == list(TokenBudgetSampler(lengths, 1500, **options))
        seen.append(batches)
    assert seen[0] != seen[1] and {frozenset(b) for b in seen[0]} != {frozenset(b) for b in seen[1]}
    epoch[0] = 0
    assert list(TokenBudgetSampler(lengths, 1500, **options, seed=1)) != seen[0]
    longer = [length for length in lengths if length > 1500]
    assert longer and sum(len(batch) == 1 for batch in seen[0]) >= len(longer)


def test_sampler_fills_the_budget():
    lengths = [104] * 64  # between two steps of length, and 16 of them are exactly the budget
    assert [len(batch) for batch in TokenBudgetSampler(lengths, 1664, max_pairs=100)] == [16] * 4
    lengths = random_lengths(2000)
    sampler = TokenBudgetSampler(lengths, 8192, max_pairs=10_000)
    assert sum(lengths) > 0.85 * 8192 * len(sampler)


def test_sampler_says_what_it_cannot_do(library_log):
    sampler = TokenBudgetSampler([100] * 5, 150, max_pairs=8, ranks=4)
    batches = list(sampler)
    assert len(batches) == 8 and "3 of 5 pairs are taken twice an epoch, to fill 4 processes" in library_log.text
    library_log.clear()
    TokenBudgetSampler([10] * 64, 10_000, max_pairs=8)
    assert "8 of 8 micro-batches end at 8 pairs, not at max_tokens_per_batch=10000" in library_log.text


def one_step(tokenizer, args):
    """Metrics of an epoch that is one step, and how far SGD went: as far as the gradient says."""
    from tests.train.test_trainer import make_trainer

    trainer = make_trainer(args, tokenizer, make_model(), make_records(13))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    way = [(p.detach() - start).flatten() for p, start in zip(trainer.model.parameters(), before, strict=True)]
    return read_metrics(args.output_dir), torch.cat(way), trainer


SGD = dict(optim="sgd", max_steps=1, alpha=0.8, max_grad_norm=0.0, learning_rate=0.1)
UNEVEN = dict(max_tokens_per_batch=90, gradient_accumulation_steps=100, per_device_train_batch_size=4)


def test_train_weighs_pairs_equally_in_uneven_micro_batches(tokenizer, config, tmp_path):
    padded = config(**SGD, per_device_train_batch_size=13, packing=False)
    uneven = config(**SGD, **UNEVEN, output_dir=str(tmp_path / "uneven"))
    (start, expected, *_), way, _ = one_step(tokenizer, padded)
    (packed_start, found, *_), packed_way, trainer = one_step(tokenizer, uneven)
    sizes = trainer.get_train_dataloader().batch_sampler.sizes
    assert len(set(sizes)) > 1 and sum(sizes) == 13
    assert start["layout"] == "padded" and packed_start["layout"] == "packed, prompts shared"
    for key in ("loss", "rewards/margins", "entropy", "logps/chosen", "num_tokens", "grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key
    assert (packed_way - way).norm() < 1e-3 * way.norm()


def test_train_weighs_pairs_equally_in_uneven_micro_batches_of_two_processes(tokenizer, config, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).parents[1] / "packing_worker.py"
    environment = {**os.environ, "PYTHONPATH": str(worker.parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, str(worker), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    _, way, _ = one_step(tokenizer, config(**SGD, per_device_train_batch_size=13, packing=False))
    assert (torch.load(tmp_path / "way.pt") - way).norm() < 1e-3 * way.norm()


def test_train_with_a_budget_resumes_with_the_metrics_of_an_uninterrupted_run(tokenizer, config):
    from tests.train.test_trainer import make_trainer

    args = config(max_steps=-1, num_train_epochs=3, save_strategy="steps", save_steps=5, max_tokens_per_batch=120)
    trainer = make_trainer(args, tokenizer, records=make_records(30))
    trainer.train()
    steps = len(trainer.get_train_dataloader())
    assert steps % 5 and 5 < steps < 15
    expected = [line for line in read_metrics(args.output_dir) if "loss" in line]
    assert len(expected) == 3 * steps
    for checkpoint in (5, steps - steps % 5 + 5):  # in the first epoch and in the second
        resumed = make_trainer(args, tokenizer, records=make_records(30))
        resumed.train(resume_from_checkpoint=str(Path(args.output_dir) / f"checkpoint-{checkpoint}"))
        found = [line for line in read_metrics(args.output_dir) if "loss" in line]
        assert found == expected


@pytest.mark.parametrize(
    "options", [{}, {"shared_prompt": False}, {"shared_prompt": True}, {"packing": False}], ids=str
)
def test_train_starts_at_zero_rewards_in_every_layout(options, tokenizer, config):
    from tests.train.test_trainer import make_trainer

    args = config(max_steps=1, max_tokens_per_batch=100, precompute_ref_batch_size=12, **options)
    make_trainer(args, tokenizer).train()
    line = read_metrics(args.output_dir)[1]
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(line[key]) < 1e-5, key
    assert line["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": False, "shared_prompt": True}, "leave out packing=False"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch must be a positive whole number or None, got 0"),
        ({"max_tokens_per_batch": 9, "train_sampling_strategy": "sequential"}, "leave out train_sampling_strategy"),
        ({"max_tokens_per_batch": 9, "dataloader_drop_last": True}, "leave out dataloader_drop_last"),
        ({"max_tokens_per_batch": 9, "auto_find_batch_size": True}, "leave out one of the two"),
    ],
)
def test_config_refuses_options_that_exclude_each_other(options, message, config):
    with pytest.raises(ValueError, match=message):
        config(**options)
