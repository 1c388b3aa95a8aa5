"""Models by name and adapters on them: whole, of the right reference, and saved as what they are; or refused."""

import copy

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from hdpo_train import HDPOTrainer, reference
from hdpo_train.config import ScriptArguments
from hdpo_train.data.tokenize import tokenize_pairs
from hdpo_train.model.loading import disable_dropout, load_model, max_positions, varies_beyond
from hdpo_train.run.report import read_metrics
from hdpo_train.training import lora_config, make_trainer
from tests.train.tiny import _IDS, _KV, _SIZE, VOCAB, make_model, make_records

peft = pytest.importorskip("peft")
IDS = torch.arange(5, 25).unsqueeze(0)


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def trainer_of(model, args, tokenizer, **options):
    data = Dataset.from_list(make_records())
    return HDPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **options)


def first_line(args):
    return next(line for line in read_metrics(args.output_dir) if "loss" in line)


def assert_starts_at_its_reference(args):
    line = first_line(args)
    assert line["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert max(abs(line[f"rewards/{side}"]) for side in ("chosen", "rejected")) < 1e-6


@torch.no_grad()
def logps_alone(model, tokenizer, side):
    """Of each record, by transformers' own forward, one sequence at a time."""
    found = []
    for example in tokenize_pairs(Dataset.from_list(make_records()), tokenizer):
        completion = torch.tensor(example[f"{side}_ids"])
        ids = torch.tensor([example["prompt_ids"] + example[f"{side}_ids"]])
        logits = model(input_ids=ids).logits[0, -len(completion) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, completion[:, None]).sum().item())
    return found


@pytest.fixture(scope="module")
def sft(tmp_path_factory, tokenizer):
    """The folder of an adapter that has been trained, with its base model beside it, and the model of both."""
    folder = tmp_path_factory.mktemp("sft")
    make_model().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(base, lora(init_lora_weights=False, lora_dropout=0.1)).eval()
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder / "adapter", model


@pytest.mark.parametrize("load", [str, AutoModelForCausalLM.from_pretrained, load_model])
def test_train_goes_on_with_the_adapter_that_a_folder_holds(load, sft, tokenizer, config, tmp_path):
    folder, model = sft
    args = config(max_steps=2, learning_rate=1e-2)
    trainer = trainer_of(load(folder), args, tokenizer)
    for side in ("chosen", "rejected"):
        found = trainer.train_dataset[f"ref_{side}_logp"][:]
        assert found == pytest.approx(logps_alone(model, tokenizer, side), abs=1e-4)
    trainer.train()
    assert_starts_at_its_reference(args)
    trainer.save_model(str(tmp_path / "saved"))
    trained = trainer.model.eval()(IDS).logits
    assert not torch.allclose(trained, model(IDS).logits, atol=1e-3)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), load_model(str(tmp_path / "saved"))):
        torch.testing.assert_close(loaded(IDS).logits, trained)


@pytest.mark.parametrize("load", [str, AutoModelForCausalLM.from_pretrained])
def test_init_refuses_an_adapter_on_an_adapter(load, sft, tokenizer, config):
    with pytest.raises(ValueError, match=r"has an adapter already: leave peft_config .*out.* merge it"):
        trainer_of(load(sft[0]), config(), tokenizer, peft_config=lora())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"lora_r": 4}, None),
        ({"lora_r": 8}, "--lora_r is 8, but .* is an adapter with 4"),
        ({"lora_target_modules": ["q_proj"]}, "--lora_target_modules is .*'q_proj'"),
        ({"lora_dropout": 0.1}, "--lora_dropout 0.1 on an adapter that has been trained"),
    ],
    ids=str,
)
def test_make_trainer_takes_an_adapter_with_its_own_options_only(options, message, sft, config, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Say a:", "chosen": " a", "rejected": " b"}\n')
    script = ScriptArguments(str(sft[0]), str(tmp_path / "pairs.jsonl"), use_peft=True, **options)
    if message is None:
        assert make_trainer(script, config()).model.peft_config["default"].r == 4
    else:
        with pytest.raises(ValueError, match=message):
            make_trainer(script, config())


@pytest.mark.parametrize(
    ("words", "modules"),
    [
        (None, "all-linear"),
        (["all-linear"], "all-linear"),
        ([r".*\.(up|down)_proj"], r".*\.(up|down)_proj"),
        (["up_proj"], {"up_proj"}),
        (["self_attn.q_proj", "up_proj"], {"self_attn.q_proj", "up_proj"}),
    ],
)
def test_lora_takes_names_a_word_or_a_regular_expression(words, modules):
    config = lora_config(ScriptArguments(use_peft=True, lora_target_modules=words))
    assert config.target_modules == modules and (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.0)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_load_model_refuses_files_that_lack_a_weight(kind, sft, tmp_path):
    if kind == "model":
        make_model("llama-tied").save_pretrained(tmp_path)  # whose head is not missing
        lost, file = "model.layers.1.mlp.up_proj.weight", tmp_path / "model.safetensors"
    else:
        load_model(str(sft[0])).save_pretrained(tmp_path)
        lost, file = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", tmp_path / "adapter_model.safetensors"
    load_model(str(tmp_path))
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{lost.removesuffix('weight')}"):
        load_model(str(tmp_path))


def test_load_model_refuses_an_adapter_on_a_base_that_lacks_a_weight(sft, tmp_path):
    base = make_model()
    del base.model.layers[0].mlp.up_proj.weight
    base.save_pretrained(tmp_path)
    model = load_model(str(sft[0]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no weights for model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", False])
def test_train_starts_at_its_reference_however_the_adapter_was_made(init, tokenizer, config, tmp_path):
    args = config(max_steps=2, learning_rate=1e-2)
    trainer = trainer_of(make_model(), args, tokenizer, peft_config=lora(init_lora_weights=init))
    expected = None if init is False else logps_alone(make_model(), tokenizer, "chosen")
    assert expected is None or trainer.train_dataset["ref_chosen_logp"][:] == pytest.approx(expected, abs=1e-4)
    trainer.train()
    assert_starts_at_its_reference(args)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "saved")
    torch.testing.assert_close(loaded(IDS).logits, trainer.model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lora(init_lora_weights="pissa_niter_2"), "'pissa_niter_2' .*would load as another model; use 'pissa'"),
        (peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"]), "ADALORA adds a loss of its own"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING adds virtual tokens"),
    ],
)
@pytest.mark.parametrize("given", ["peft_config", "peft model"])
def test_init_refuses_adapters_that_it_cannot_train(given, adapter, message, tokenizer, config):
    model, options = make_model(), {"peft_config": copy.deepcopy(adapter)}
    if given == "peft model":
        model, options = peft.get_peft_model(model, options["peft_config"]), {}
    with pytest.raises(ValueError, match=message):
        trainer_of(model, config(), tokenizer, **options)


def test_init_refuses_frozen_weights_before_the_reference_pass(sft, tokenizer, config, monkeypatch):
    monkeypatch.setattr(reference, "_compute", lambda *_: pytest.fail("computed a reference"))
    frozen = peft.PeftModel.from_pretrained(make_model(), sft[0])
    with pytest.raises(ValueError, match=r"frozen, so that nothing would be trained: .*is_trainable=True"):
        trainer_of(frozen, config(), tokenizer)
    with pytest.raises(ValueError, match="LlamaForCausalLM are frozen"):
        trainer_of(make_model().requires_grad_(False), config(), tokenizer)


def test_init_does_not_take_one_scales_cache_for_anothers(sft, tokenizer, config):
    """The weights of both are the same."""
    found = []
    for alpha in (8, 16):
        model = load_model(str(sft[0]))
        model.peft_config["default"].lora_alpha = alpha
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scaling["default"] = alpha / 4
        found.append(trainer_of(model, config(), tokenizer).train_dataset["ref_chosen_logp"][:])
    assert found[0] != pytest.approx(found[1], abs=1e-2)


def test_train_loads_the_best_adapter_whatever_its_name(tokenizer, config):
    model = peft.get_peft_model(make_model(), lora(), adapter_name="sft")
    args = config(
        max_steps=3, learning_rate=0.5, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_logps/rejected", greater_is_better=True,
    )  # fmt: skip
    trainer = trainer_of(model, args, tokenizer, eval_dataset=Dataset.from_list(make_records(4, seed=1)))
    trainer.train()
    values = [line["eval_logps/rejected"] for line in trainer.state.log_history if "eval_logps/rejected" in line]
    assert max(values) != values[-1]
    assert trainer.evaluate()["eval_logps/rejected"] == pytest.approx(max(values), rel=1e-5)


NOISY = {
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=2,
            word_embed_proj_dim=32, max_position_embeddings=256, dropout=0.1, layerdrop=0.2,
        )
    ),
    "starcoder2": lambda: Starcoder2ForCausalLM(
        Starcoder2Config(**_SIZE, **_KV, **_IDS, residual_dropout=0.1, embedding_dropout=0.1, attention_dropout=0.1)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_SIZE, **_KV, **_IDS, router_jitter_noise=0.3, num_local_experts=2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISY)
def test_disable_dropout_leaves_nothing_random(kind):
    torch.manual_seed(0)
    model = NOISY[kind]()
    outputs = [model.train()(IDS).logits for _ in range(8)]
    assert not all(torch.equal(each, outputs[0]) for each in outputs)
    disable_dropout(model)
    assert all(torch.equal(model.train()(IDS).logits, model.eval()(IDS).logits) for _ in range(8))


def test_train_keeps_the_dropout_of_its_peft_config(tokenizer, config):
    args = config(max_steps=2)
    trainer = trainer_of(make_model("gpt2"), args, tokenizer, peft_config=lora(lora_dropout=0.2, fan_in_fan_out=True))
    found = {name: m.p for name, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for name, p in found.items() if "lora_dropout" in name} == {0.2}
    assert {p for name, p in found.items() if "lora_dropout" not in name} == {0.0}
    trainer.train()
    assert_starts_at_its_reference(args)


def rope(kind, most=64, **options):
    return LlamaConfig(max_position_embeddings=most, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **options})


@pytest.mark.parametrize(
    ("config", "most", "varies"),
    [
        (rope("default"), 64, None),
        (rope("linear", factor=2.0), 128, None),
        (rope("dynamic", factor=4.0), 256, 64),
        (rope("yarn", factor=4.0, original_max_position_embeddings=64), 256, None),
        (rope("yarn", 256, factor=4.0, original_max_position_embeddings=64), 256, None),
        (rope("llama3", 256, factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0,
              high_freq_factor=4.0), 256, None),
        (rope("longrope", 256, original_max_position_embeddings=32, short_factor=[1.0] * 64,
              long_factor=[2.0] * 64), 256, 32),
        (GPT2Config(n_positions=128), 128, None),
    ],
)  # fmt: skip
def test_max_positions_minds_the_scaling_of_rotary_positions(config, most, varies):
    assert (max_positions(config), varies_beyond(config)) == (most, varies)
