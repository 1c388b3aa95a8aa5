"""The router's loss of a mixture of experts: that of transformers, in every layout, or a refusal."""

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM as Auto
from transformers import Llama4TextConfig, MixtralConfig, Qwen3MoeConfig

from hdpo_kernels import naive
from hdpo_train import HDPOConfig, HDPOTrainer
from hdpo_train.data.tokenize import PairCollator
from hdpo_train.model import router
from hdpo_train.model.head import attach_loss, model_inputs
from hdpo_train.model.packing import PADDED, Layout, use_layout
from hdpo_train.model.router import check_router_loss, router_coefficient
from tests.train.model.test_packing import CPU, KV, LOSS, SIZE, gradients, make_examples
from tests.train.tiny import make_model, make_records

FACTOR = 0.5
EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=FACTOR)
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZE, **KV, **EXPERTS, num_local_experts=4),
    "qwen3-moe": lambda: Qwen3MoeConfig(  # its first layer has no experts
        **SIZE, **KV, **EXPERTS, num_experts=6, moe_intermediate_size=16, mlp_only_layers=[0]
    ),
}


def build(family: str):
    torch.manual_seed(0)
    model = Auto.from_config(CONFIGS[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that tokens prefer experts
            if name.endswith("gate.weight"):
                parameter.mul_(20)
    return model.train()


def rows_of(examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Every sequence in a row of its own, and transformers' attention mask."""
    sequences = [torch.tensor(e["prompt_ids"] + e[f"{side}_ids"]) for e in examples for side in ("chosen", "rejected")]
    masks = [torch.ones_like(ids) for ids in sequences]
    return pad_sequence(sequences, batch_first=True), pad_sequence(masks, batch_first=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_layout_has_the_router_loss_of_transformers(family, checkpointing):
    model, examples = build(family), make_examples()
    ids, mask = rows_of(examples)
    batch = PairCollator(0)(examples)
    output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    rows = output.logits.flatten(0, 1)[batch["rows"]]
    plain = naive.hdpo_loss(rows, batch["labels"].tensor, batch["cu_seqlens"], batch["ref_logps"], **LOSS).loss
    expected = plain + FACTOR * output.aux_loss
    gate = next(name for name, _ in model.named_parameters() if name.endswith("gate.weight"))
    (of_router,) = torch.autograd.grad(FACTOR * output.aux_loss, model.get_parameter(gate), retain_graph=True)
    truth = gradients(model, expected)
    assert of_router.norm() > 0.01 * truth[gate].norm()  # a hundred times the tolerance below
    attach_loss(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for layout in (PADDED, Layout(packed=True), Layout(packed=True, share=True)):
        use_layout(model, layout)
        inputs = model_inputs(PairCollator(0, layout)(examples), CPU, LOSS, router=FACTOR)
        result = model(**inputs)
        torch.testing.assert_close(inputs["pairs"].aux_loss, output.aux_loss.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model, result.loss).items():
            assert (gradient - truth[name]).norm() <= 1e-4 * truth[name].norm() + 1e-6, (layout, name)


def trainer_of(family, tokenizer, tmp_path, **options) -> HDPOTrainer:
    folders = {"output_dir": str(tmp_path / "out"), "ref_cache_dir": str(tmp_path / "ref")}
    steps = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    args = HDPOConfig(**folders, **{**steps, **options}, use_cpu=True, report_to="none", disable_tqdm=True)
    records = Dataset.from_list(make_records(6))
    model = make_model() if family == "llama" else build(family)
    return HDPOTrainer(model=model, args=args, train_dataset=records, eval_dataset=records, processing_class=tokenizer)


def test_the_router_loss_is_part_of_the_loss_and_logged(tokenizer, tmp_path):
    logs = {}
    for factor in (None, 0.0):
        trainer = trainer_of("mixtral", tokenizer, tmp_path / str(factor), router_aux_loss_coef=factor, beta=0.01)
        trainer.train()
        logs[factor] = [line for line in trainer.state.log_history if "loss" in line] + [trainer.evaluate()]
    for ours, plain, prefix in zip(logs[None], logs[0.0], ("", "", "eval_"), strict=True):
        assert f"{prefix}aux_loss" not in plain
        # nearly nothing has been learnt, and so the other loss is that of the other run
        added = FACTOR * ours[f"{prefix}aux_loss"]
        assert ours[f"{prefix}loss"] == pytest.approx(plain[f"{prefix}loss"] + added, abs=1e-4) and added > 0.9


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mixtral", {"tiled_layers": True}, "with tiled_layers a router sees tokens in parts.*router_aux_loss_coef=0"),
        (
            "mixtral",
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant=True.*no gradient",
        ),
        ("llama", {"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 .* no router loss of LlamaForCausalLM"),
        ("mixtral", {"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be finite and not negative"),
    ],
    ids=["tiles", "reentrant", "dense", "negative"],
)
def test_a_router_loss_that_cannot_be_had_is_refused(tokenizer, tmp_path, family, options, reason):
    with pytest.raises(ValueError, match=reason):
        trainer_of(family, tokenizer, tmp_path, **options)


def test_the_router_loss_of_split_sequences_is_refused(tmp_path):
    args = HDPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="not linear in tokens, and with sp_size=2"):
        router_coefficient(build("mixtral"), args, ranks=2)
    args.router_aux_loss_coef = 0.0
    assert router_coefficient(build("mixtral"), args, ranks=2) == 0


def test_a_family_without_a_router_loss_trains_without(tmp_path):
    """The config of Llama 4 has a coefficient, and transformers computes nothing with it."""
    config = Llama4TextConfig(**SIZE, **KV, num_local_experts=2, interleave_moe_layer_step=1, intermediate_size_mlp=48)
    assert router_coefficient(Auto.from_config(config), HDPOConfig(output_dir=str(tmp_path), use_cpu=True)) == 0


def test_a_family_that_does_it_in_its_own_way_is_refused(monkeypatch):
    own = router.router_loss
    monkeypatch.setattr(router, "router_loss", lambda *args: 2 * own(*args))
    with pytest.raises(ValueError, match=r"router loss of MixtralForCausalLM cannot be computed here .*=0"):
        check_router_loss(build("mixtral"))
