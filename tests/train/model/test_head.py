"""The loss inside the model's forward: the same numbers as from the model's own logits, or a refusal."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hdpo_kernels import naive
from hdpo_train.data.tokenize import PairCollator, tokenize_pairs
from hdpo_train.model.head import UnsupportedHead, attach_loss, find_transform, mean_logits, model_inputs
from tests.train.tiny import FAMILIES, make_model, make_records

LOSS = {"alpha": 0.8, "beta": 0.5}
PAD = 1


@pytest.fixture
def batch(tokenizer):
    from datasets import Dataset

    examples = tokenize_pairs(Dataset.from_list(make_records(3)), tokenizer)
    batch = PairCollator(PAD)(list(examples))
    assert (batch["input_ids"] == PAD).sum() == batch["input_ids"].numel() - batch["num_tokens"]
    batch["ref_logps"] = -10 - torch.arange(6.0)
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_loss_equals_naive_loss_of_the_models_logits(family, batch):
    model = make_model(family)
    mask = batch["input_ids"] != PAD  # transformers' own way with padding; the loss leaves it to causality
    rows = model(input_ids=batch["input_ids"], attention_mask=mask).logits.flatten(0, 1)[batch["rows"]]
    expected = naive.hdpo_loss(rows, batch["labels"].tensor, batch["cu_seqlens"], batch["ref_logps"], **LOSS)
    expected_grads = torch.autograd.grad(expected.loss, list(model.parameters()))

    attach_loss(model)
    result = model(**model_inputs(batch, torch.device("cpu"), LOSS))
    grads = torch.autograd.grad(result.loss, list(model.parameters()))
    for name, value, truth in zip(result._fields, result, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for (name, _), grad, truth in zip(model.named_parameters(), grads, expected_grads, strict=True):
        assert (grad - truth).norm() <= 1e-4 * truth.norm() + 1e-7, name


def test_attach_loss_leaves_forward_without_pairs_as_it_was(model, batch):
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["input_ids"] != PAD}
    before = model(**inputs).logits
    attach_loss(model)
    assert torch.equal(model(**inputs).logits, before)
    model.generate(batch["input_ids"][:1], max_new_tokens=2, pad_token_id=1)


def test_attach_loss_runs_through_the_heads_own_call(model, batch):
    """Hooks on the LM head (ZeRO-3 gathers its weight in one) must run around the loss."""
    attach_loss(model)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(**model_inputs(batch, torch.device("cpu"), LOSS))
    assert seen == [(len(batch["labels"].tensor), 32)]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    hidden = torch.ones(2, 32)
    assert torch.equal(model.lm_head(hidden), torch.nn.functional.linear(hidden, model.lm_head.weight))
    assert not copied.lm_head(hidden).any(), "a copy has its own head"


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_attach_loss_leaves_a_copy_of_the_model_its_own_weights(clone, model, batch):
    other = make_model(seed=1)
    ids = batch["input_ids"][:1]
    expected = other(input_ids=ids).logits
    attach_loss(model)
    copied = clone(model)
    attach_loss(copied)
    copied.load_state_dict(other.state_dict())
    attach_loss(other)
    assert torch.equal(copied(input_ids=ids).logits, expected)
    results = [each(**model_inputs(batch, torch.device("cpu"), LOSS)).logps for each in (copied, other, model)]
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2])


@pytest.mark.parametrize(
    ("family", "softcap", "scale"),
    [("llama", None, 1.0), ("gemma2", 5.0, 1.0), ("cohere", None, 0.25), ("granite", None, 1 / 3), ("phi", None, 1.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_find_transform_reads_softcap_and_scale(family, softcap, scale, dtype):
    transform = find_transform(make_model(family).to(dtype))
    assert transform.softcap == softcap
    assert transform.logit_scale == pytest.approx(scale)


class NormBeforeHead(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return type("Output", (), {"logits": self.lm_head(hidden * 2)})()


class BiasedLogits(LlamaForCausalLM):
    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


@pytest.mark.parametrize(("kind", "reason"), [(NormBeforeHead, "hidden states"), (BiasedLogits, "do not explain")])
def test_attach_loss_refuses_a_head_it_cannot_represent(kind, reason):
    model = make_model()
    strange = kind(model.config).eval()
    with pytest.raises(UnsupportedHead, match=rf"{kind.__name__}.*{reason}"):
        attach_loss(strange)


def test_attach_loss_does_not_blame_the_head_for_nan_weights(model):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    attach_loss(model)


def test_attach_loss_refuses_an_encoder_decoder():
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedHead, match="T5ForConditionalGeneration is an encoder-decoder"):
        attach_loss(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_mean_logits_are_the_means_of_the_logits(dtype, with_bias, monkeypatch):
    monkeypatch.setattr("hdpo_train.model.head._BLOCK", 100)
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((9, 24), (97, 24), (97,)))
    bias = bias if with_bias else None
    logits = torch.nn.functional.linear(*(None if t is None else t.double() for t in (hidden, weight, bias)))
    actual = mean_logits(hidden, weight, bias, 0.7)
    torch.testing.assert_close(actual, (0.7 * logits.mean(1)).float(), rtol=1e-5, atol=1e-6)
    assert mean_logits(hidden[:0], weight, bias, 0.7).shape == (0,)


def test_attach_loss_refuses_an_adapter_on_the_head(model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedHead, match=r"LM head of LlamaForCausalLM.*leave the head out"):
        attach_loss(wrapped.get_base_model())


def test_attach_loss_refuses_a_model_that_is_tensor_parallel(model):
    model._tp_size = 2  # as from_pretrained(tp_plan="auto") leaves it
    with pytest.raises(UnsupportedHead, match="LlamaForCausalLM is tensor-parallel over 2 ranks"):
        attach_loss(model)


def test_attach_loss_refuses_a_head_that_is_not_linear(model):
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    with pytest.raises(UnsupportedHead, match="Sequential, not a plain"):
        attach_loss(model)
