"""What `hdpo-train plan` says against what a step really takes."""

import copy
import itertools

import pytest
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config, GPT2Config, LlamaConfig, TrainerCallback, modeling_utils

from hdpo_kernels import lm_head
from hdpo_train import HDPOConfig, HDPOTrainer, plan
from hdpo_train.head import bare
from hdpo_train.packing import Layout, find_layout
from tests.train.tiny import Elsewhere

LLAMA = LlamaConfig(
    vocab_size=8000, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
GEMMA2 = Gemma2Config(
    vocab_size=8000, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=256, final_logit_softcapping=30.0,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=8000, n_embd=128, n_layer=3, n_head=4, n_positions=256)


def arguments(tmp_path, **options) -> HDPOConfig:
    given = dict(
        output_dir=str(tmp_path / "out"), ref_cache_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=2,
        per_device_train_batch_size=2, max_length=96, save_strategy="no",
    )  # fmt: skip
    return HDPOConfig(**{**given, **options})


class Measured(TrainerCallback):
    """Bytes of tensors alive at the peak of the second step, as torch's allocator saw them."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 1:
            states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
            self.optimizer = sum(t.nbytes for t in states)
            weights = sum(t.nbytes for t in {*model.parameters()})
            self.before = weights + self.optimizer + lm_head._kept.memory.nbytes
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.profile.__exit__(None, None, None)
            events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            allocated = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
            self.peak = self.before + max(itertools.accumulate(allocated))


def check_plan(config, args: HDPOConfig, tokenizer, build=plan.AutoModelForCausalLM.from_config) -> plan.Memory:
    """The plan's memory, within 15 % of what two steps of the trainer take with the pairs that the plan supposes."""
    model = build(config)
    batch = plan.fullest(args, find_layout([bare(model)], args.packing, args.shared_prompt))
    memory = plan.peak_memory(config, args, batch, build)
    lm_head._kept.__dict__.clear()
    pair = {
        "prompt_ids": [1] * batch.prompt, "chosen_ids": [2] * batch.completion, "rejected_ids": [3] * batch.completion,
    }  # fmt: skip
    records = Dataset.from_list([pair] * (2 * batch.pairs * args.gradient_accumulation_steps))
    trainer = HDPOTrainer(model=model, args=args, train_dataset=records, processing_class=tokenizer)
    measured = Measured()
    trainer.add_callback(measured)
    trainer.train()
    planned = sum(memory.device.values())
    sizes = f"{planned / 2**20:.1f} MiB planned, {measured.peak / 2**20:.1f} taken"
    assert abs(planned - measured.peak) < 0.15 * measured.peak, sizes
    assert memory.device["optimizer"] == measured.optimizer
    return memory


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LLAMA, {}),
        (LLAMA, {"packing": False}),
        (LLAMA, {"gradient_accumulation_steps": 3}),
        (LLAMA, {"bf16": True}),
        (LLAMA, {"optim": "adafactor"}),
        (LLAMA, {"max_prompt_length": 64, "shared_prompt": True}),
        (LLAMA, {"max_tokens_per_batch": 900, "per_device_train_batch_size": 64}),
        (GEMMA2, {"gradient": "sampled", "epsilon": 0.01}),
        (GEMMA2, {"gradient_checkpointing": True}),
        (GPT2, {}),
        (GPT2, {"optim": "sgd", "gradient_checkpointing": True}),
    ],
    ids=lambda value: getattr(value, "model_type", None) or " ".join(value) or "as it is",
)
def test_memory_is_within_15_percent_of_what_a_step_takes(tmp_path, tokenizer, config, options):
    check_plan(config, arguments(tmp_path, **options), tokenizer)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=" ".join)
def test_memory_of_adapters(tmp_path, tokenizer, options):
    peft = pytest.importorskip("peft")

    def build(config):
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(plan.AutoModelForCausalLM.from_config(config), lora)

    memory = check_plan(LLAMA, arguments(tmp_path, **options), tokenizer, build).device
    trained = sum(p.nbytes for p in build(LLAMA).parameters() if p.requires_grad)
    assert memory["weights"] > 10 * trained and memory["gradients"] <= trained


def test_memory_on_the_host(tmp_path, tokenizer, monkeypatch):
    """Of offloaded activations, which here go where torch's allocator does not see them."""
    monkeypatch.setattr(modeling_utils, "save_on_cpu", out_of_sight := Elsewhere())
    options = dict(gradient_checkpointing=True, per_device_train_batch_size=4, max_length=256)
    args = arguments(tmp_path, **options)
    args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = {"offload": True}
    memory = check_plan(LLAMA, args, tokenizer)
    assert memory.host == 3 * (4 * 511) * 128 * 4  # layers, tokens (a prompt of one is shared), hidden size, bytes
    assert out_of_sight.nbytes == 2 * memory.host  # in two steps
    args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = None
    batch = plan.fullest(args, Layout(packed=True))
    kept = plan.peak_memory(LLAMA, args, batch, plan.AutoModelForCausalLM.from_config)
    assert kept.host == 0
    assert kept.device["activations"] - memory.device["activations"] > memory.host / 2


def test_memory_with_an_attention_that_skips_what_is_masked(tmp_path):
    args = arguments(tmp_path)

    def build(attention):
        return lambda config: plan.AutoModelForCausalLM.from_config(config, attn_implementation=attention)

    batch = plan.fullest(args, Layout(packed=True, share=True))
    assert plan.peak_memory(LLAMA, args, batch, build("flex_attention")) == plan.peak_memory(
        LLAMA, args, batch, build("sdpa")
    )


def test_fullest_keeps_within_the_budget(tmp_path):
    def fullest(layout, **options):
        return plan.fullest(arguments(tmp_path, per_device_train_batch_size=64, **options), layout)[1:]

    packed = Layout(packed=True)
    assert fullest(packed) == (64, 1, 95)
    assert fullest(packed, max_prompt_length=32) == (64, 32, 64)
    assert fullest(packed, max_prompt_length=200) == (64, 95, 1)  # a completion has a token
    assert fullest(packed, max_tokens_per_batch=100) == (1, 1, 95)  # a longer pair is a batch of its own
    for layout in (Layout(), packed, Layout(packed=True, share=True)):
        for budget in (200, 500, 1000, 5000):
            pairs, prompt, completion = fullest(layout, max_tokens_per_batch=budget, max_prompt_length=32)
            tokens = pairs * layout.tokens(prompt, completion, completion)
            assert tokens <= budget and (tokens > 0.9 * budget or tokens == layout.tokens(32, 64, 64))


def step_time(tmp_path, monkeypatch, layers: int, seconds) -> plan.StepTime:
    """seconds: of every turn of a model with so many layers."""
    monkeypatch.setattr(plan, "_time", lambda models, *_: [seconds(m.config.num_hidden_layers) for m in models])
    config, args = copy.deepcopy(LLAMA), arguments(tmp_path)
    config.num_hidden_layers = layers
    return plan.step_time(config, args, plan.fullest(args, Layout()), plan.AutoModelForCausalLM.from_config)


@pytest.mark.parametrize("layers", [2, 4, 7])
def test_time_is_linear_in_the_layers(tmp_path, monkeypatch, layers):
    time = step_time(tmp_path, monkeypatch, layers, lambda n: [mood * (1 + 0.25 * n) for mood in (1, 2, 3)])
    assert time.quartiles == pytest.approx([mood * (1 + layers * 0.25) for mood in (1, 2, 3)])
    assert time.timed == ((1, 4) if layers == 7 else (layers,))


def test_time_keeps_its_median_between_its_quartiles_on_a_restless_machine(tmp_path, monkeypatch):
    # what 3 layers add, turn by turn: 3, 0.3, -1, 1.2 and 0.6 s; quartiles of each model alone would cross
    turns = {1: [1.0, 1.7, 3.0, 1.0, 1.4], 4: [4.0, 2.0, 2.0, 2.2, 2.0]}
    time = step_time(tmp_path, monkeypatch, 31, turns.__getitem__)
    # 30 more layers: 31, 4.7, 3 (a layer takes no less than nothing), 13 and 7.4 s
    assert time.quartiles == pytest.approx([(3 + 4.7) / 2, 7.4, (13 + 31) / 2])
    text = plan._describe_time(time, tokens=740)
    assert text == "7.4 s a step (3.85 to 22), 100 tokens/s; extrapolated from models of 1 and 4 layers"


def test_time_that_does_not_grow_with_the_layers_is_no_number(tmp_path, monkeypatch):
    turns = {1: [1.0, 2.0, 3.0, 1.0, 1.0], 4: [4.0, 1.9, 2.9, 0.9, 1.2]}  # more: 3, -0.1, -0.1, -0.1, 0.2
    time = step_time(tmp_path, monkeypatch, 24, turns.__getitem__)
    assert time.quartiles is None
    text = plan._describe_time(time, tokens=740)
    assert "no seconds" in text and "1 and 4 layers took equally long" in text and "idle" in text


def test_main_prints_a_plan_without_weights_or_data(tmp_path, capsys, monkeypatch):
    from hdpo_train.__main__ import main

    LLAMA.save_pretrained(tmp_path / "model")  # the config alone
    words = f"plan --model_name_or_path {tmp_path / 'model'} --output_dir {tmp_path / 'out'} --use_cpu True"
    monkeypatch.setattr(plan, "_SECONDS", 0.0)
    main([*words.split(), "--max_length", "64", "--per_device_train_batch_size", "1", "--use_peft", "True"])
    printed = capsys.readouterr().out
    assert "steps of 1 pairs of 2 × 64 tokens, packed" in printed and "optimizer" in printed
    assert "tokens/s; measured" in printed
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="a plan needs --max_length"):
        plan.make_plan(LLAMA, arguments(tmp_path, max_length=None))
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "hdpo-train plan --model_name_or_path MODEL" in capsys.readouterr().err
