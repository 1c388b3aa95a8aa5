"""Packed batches and shared prompts: the same loss and gradients as padded batches, or a refusal; the token budget."""

import logging
import random

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import Gemma2Config, MistralConfig, MixtralConfig, Qwen2MoeConfig, Qwen3Config

from hdpo_train.data import PairCollator
from hdpo_train.head import attach_loss
from hdpo_train.packing import PADDED, Layout, find_layout, lay_out
from hdpo_train.reference import model_inputs
from tests.train.tiny import FAMILIES, VOCAB, make_model

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
    "mixtral": lambda: Auto.from_config(MixtralConfig(**SIZE, **KV, **EXPERTS, num_local_experts=4)),
    "qwen2-moe": lambda: Auto.from_config(
        Qwen2MoeConfig(
            **SIZE, **KV, **EXPERTS, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
        )
    ),
}
PACKED, SHARED = Layout(True, width=32), Layout(True, "always", 32)
ONE_ROW = Layout(True, "always", 0)
CPU = torch.device("cpu")


def make(name, attention="sdpa", **kwargs):
    FAMILIES.setdefault(name, MODELS[name])
    model = make_model(name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention matters: init is nearly linear
            if parameter.dim() == 2:
                parameter.mul_(3)
    if name != "gemma2":  # which is eager alone
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
    inputs = model_inputs(PairCollator(VOCAB - 1, layout)(examples), CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = model(**inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return result, dict(zip(names, torch.autograd.grad(result.loss, parameters), strict=True))


def assert_same_step(one, other, tolerance=2e-4):
    for name, value, truth in zip(one[0]._fields, one[0], other[0], strict=True):
        assert torch.allclose(value, truth, rtol=tolerance, atol=tolerance), (name, value, truth)
    for name, truth in other[1].items():
        assert (one[1][name] - truth).norm() <= 5 * tolerance * truth.norm() + 1e-6, name


def with_loss(name, attention="sdpa"):
    model = make(name, attention)
    attach_loss(model, {"alpha": 0.8, "beta": 0.5})
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_layouts_give_the_loss_and_gradients_of_padded_batches(name, attention):
    model = with_loss(name, attention)
    padded = step(model, make_examples(), PADDED)
    assert find_layout([model]) == Layout(True, "where it pays", 32)
    for layout in (PACKED, SHARED, ONE_ROW):
        assert_same_step(step(model, make_examples(), layout), padded)


@pytest.mark.parametrize(
    "shape",
    [
        {"prompt": (1, 1)},
        {"completion": (1, 1)},
        {"prompt": (6, 6)},
        {"prompt": (40, 90), "completion": (1, 90)},
        {"count": 1},
        {"count": 17, "prompt": (1, 3), "completion": (1, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_layouts_agree_on_any_lengths(name, shape):
    model, examples = with_loss(name), make_examples(1, **shape)
    padded = step(model, examples, PADDED)
    for layout in (PACKED, SHARED, Layout(True, "where it pays", 1)):
        assert_same_step(step(model, examples, layout), padded, 5e-4)


def test_shared_prompt_with_gradient_checkpointing():
    model = with_loss("gemma2")
    plain = step(model, make_examples(), SHARED)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same_step(step(model, make_examples(), SHARED), plain)


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
    inputs = model_inputs(PairCollator(0, ONE_ROW)(examples), CPU)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling takes minutes on a CPU
        expected = model(**inputs)
        model.set_attn_implementation("flex_attention")
        assert find_layout([model]) == Layout(True, "where it pays", 0)
        result = model(**inputs)
    torch.testing.assert_close(result.logps, expected.logps, rtol=1e-4, atol=1e-4)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_lay_out_small_example():
    pairs = [([1, 2, 3], [4, 5], [6])]
    batch = lay_out(pairs, ONE_ROW, 0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 2]]
    assert batch["rows"].tolist() == [2, 3, 2] and batch["labels"].tolist() == [4, 5, 6]
    assert batch["cu_seqlens"] == [0, 2, 3] and batch["document_lengths"] == [6] and batch["num_tokens"] == 9
    apart = lay_out(pairs, Layout(True), 0)
    assert apart["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6]]
    assert apart["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert apart["segment_ids"].tolist() == [[0, 0, 0, 0, 0, 3, 3, 3, 3]]
    assert apart["rows"].tolist() == [2, 3, 7] and apart["document_lengths"] == [5, 4]


@pytest.mark.parametrize("layout", [PADDED, PACKED, SHARED, ONE_ROW, Layout(True)], ids=str)
def test_lay_out_has_every_token_once_and_no_padding_where_attention_skips(layout):
    examples = make_examples(count=9)
    pairs = [(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"]) for e in examples]
    batch = lay_out(pairs, layout, 0)
    tokens = sum(layout.tokens(*map(len, pair)) for pair in pairs) if layout.packed else batch["num_tokens"]
    real = batch["segment_ids"] >= 0 if layout.packed else batch["attention_mask"].bool()
    assert real.sum() == tokens and (layout.width or not layout.packed or real.all())
    labels = [token for _, chosen, rejected in pairs for token in (*chosen, *rejected)]
    assert batch["labels"].tolist() == labels and len(batch["rows"]) == len(labels)


def test_rows_are_as_many_as_cost_least():
    lengths = [100, *[60] * 7]
    rows = Layout(True, width=10_000).rows(lengths)  # tokens are what costs: no row for the longest alone
    assert sorted(d for row in rows for d in row) == list(range(8))
    assert len(rows) * max(sum(lengths[d] for d in row) for row in rows) == 520
    assert len(Layout(True, width=1).rows(lengths)) == 5  # attention is: rows of 120, not 800 tokens for 520
    assert len(Layout(True).rows(lengths)) == 1


def test_shares_where_it_is_less_work():
    layout = Layout(True, "where it pays", width=64)
    assert layout.shares(100, 100, 100) and not layout.shares(10, 100, 100)
    assert Layout(True, "where it pays").shares(1, 1000, 1000), "what is masked costs nothing"
    assert not Layout(True, "never").shares(100, 1, 1) and Layout(True, "always", 1).shares(1, 1000, 1000)


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


@pytest.fixture
def library_log(caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("transformers").removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", ["mamba", "recurrent-gemma", "rwkv", "bloom"])
def test_find_layout_falls_back_or_refuses_where_sequences_are_not_kept_apart(kind, library_log):
    model = recurrent(kind)
    assert find_layout([model]) == PADDED
    print(library_log.text)
    assert f"{type(model).__name__} gets padded batches" in library_log.text
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot run packed batches: .*leave out packing"):
        find_layout([model], packing=True)
    assert find_layout([model], packing=False) == PADDED
