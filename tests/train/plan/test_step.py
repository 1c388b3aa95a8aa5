"""What `hdpo-train plan` says against what a step really takes."""

import copy
import gc
import itertools

import pytest
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    TrainerCallback,
    modeling_utils,
)

from hdpo_kernels import lm_head
from hdpo_train import HDPOConfig, HDPOTrainer
from hdpo_train.cli.main import main
from hdpo_train.model import tiles
from hdpo_train.model.packing import Layout
from hdpo_train.plan import memory
from hdpo_train.plan import step as plan
from hdpo_train.plan.memory import Memory, MicroBatch
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


def with_lora(config):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(Auto.from_config(config), lora)


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


def check_plan(config, args: HDPOConfig, tokenizer, build=Auto.from_config, pairs=None) -> Memory:
    """The plan's memory, within 15 % of what two steps of the trainer take with the pairs that the plan supposes.

    pairs: lengths of prompt, chosen and rejected of a micro-batch; by default those of a plan.
    """
    batch = plan.fullest(args, plan.layout_of(config, args, build))
    batch = batch if pairs is None else MicroBatch(batch.layout, pairs)
    memory = plan.peak_memory(config, args, batch, build)
    lm_head._kept.__dict__.clear()
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {side: [number] * size for number, (side, size) in enumerate(zip(sides, pair, strict=True))}
        for pair in batch.pairs
    ]
    records = Dataset.from_list(rows * (2 * args.gradient_accumulation_steps))
    trainer = HDPOTrainer(model=build(config), args=args, train_dataset=records, processing_class=tokenizer)
    measured = Measured()
    trainer.add_callback(measured)
    trainer.train()
    planned = memory.total
    sizes = f"{planned / 2**20:.1f} MiB planned, {measured.peak / 2**20:.1f} taken"
    assert abs(planned - measured.peak) < 0.15 * measured.peak, sizes
    assert memory.device["optimizer"] == pytest.approx(measured.optimizer, rel=0.01)  # and a number made in the step
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


LONG = {"max_length": 1600, "per_device_train_batch_size": 1, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        (LONG, [(1, 1500, 1300)]),
        (LONG, [(700, 800, 300)]),
        ({**LONG, "shared_prompt": False}, [(700, 800, 300)]),
        ({**LONG, "tiled_layers": True}, [(300, 1200, 1000)]),
        ({**LONG, "use_lora": True}, [(300, 1200, 600)]),
        ({**LONG, "per_device_train_batch_size": 2}, [(300, 700, 500), (300, 100, 200)]),
        ({"max_length": 1600, "per_device_train_batch_size": 1}, [(300, 1200, 600)]),
        ({**LONG, "bf16": True}, [(300, 1200, 600)]),
    ],
    ids=str,
)
def test_memory_of_pairs_of_unequal_lengths(tmp_path, tokenizer, monkeypatch, options, pairs):
    monkeypatch.setattr(tiles, "TILE", 256)
    options = dict(options)
    build = with_lora if options.pop("use_lora", False) else Auto.from_config
    config = copy.deepcopy(LLAMA)
    config.max_position_embeddings = 2048
    check_plan(config, arguments(tmp_path, **options), tokenizer, build, pairs)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=" ".join)
def test_memory_of_adapters(tmp_path, tokenizer, options):
    memory = check_plan(LLAMA, arguments(tmp_path, **options), tokenizer, with_lora).device
    trained = sum(p.nbytes for p in with_lora(LLAMA).parameters() if p.requires_grad)
    assert memory["weights"] > 10 * trained and memory["gradients"] <= trained


DEEP = dict(
    vocab_size=500, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0,
    max_position_embeddings=256,
)  # fmt: skip
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)


LLAMA5 = LlamaConfig(**DEEP, num_hidden_layers=5, tie_word_embeddings=True)
GEMMA3 = Gemma3TextConfig(**DEEP, num_hidden_layers=8, sliding_window=32)
MIXTRAL = MixtralConfig(**DEEP, **EXPERTS, num_hidden_layers=4, router_aux_loss_coef=0.0)
GPT_OSS = GptOssConfig(**DEEP, **EXPERTS, num_hidden_layers=4, sliding_window=32)
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("config", "build", "options"),
    [
        (LLAMA5, Auto.from_config, {}),
        (LLAMA5, Auto.from_config, CHECKPOINTED | {"gradient_checkpointing_kwargs": {"every_n_layers": 3}}),
        (LLAMA5, with_lora, CHECKPOINTED | {"offload": True}),
        (GEMMA3, Auto.from_config, {"gradient_accumulation_steps": 2}),
        (GEMMA3, Auto.from_config, CHECKPOINTED | {"tiled_layers": True}),
        (GEMMA3, with_lora, {}),
        (MIXTRAL, Auto.from_config, {"bf16": True}),
        (MIXTRAL, with_lora, CHECKPOINTED),
        (GPT_OSS, Auto.from_config, CHECKPOINTED | {"gradient": "sampled", "epsilon": 0.01}),
    ],
    ids=lambda value: getattr(value, "model_type", None) or (" ".join(value) if isinstance(value, dict) else ""),
)
def test_one_layer_of_each_kind_stands_for_all(tmp_path, monkeypatch, config, build, options):
    monkeypatch.setattr(tiles, "TILE", 64)
    batch = MicroBatch(Layout(packed=True, share=True), [(20, 80, 50), (1, 40, 60)])
    args = arguments(tmp_path, **{name: value for name, value in options.items() if name != "offload"})
    if "offload" in options:
        args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = {"offload": True}
    few = plan.peak_memory(config, args, batch, build)
    monkeypatch.setattr(memory, "_keep_one_of_each_kind", lambda *_: [])
    whole = plan.peak_memory(config, args, batch, build)
    assert few.total == pytest.approx(whole.total, rel=0.01)
    assert few.device == pytest.approx(whole.device, rel=0.01, abs=0.01 * whole.total)


def test_the_router_loss_is_that_of_all_layers(tmp_path, monkeypatch):
    config = copy.deepcopy(MIXTRAL)
    config.num_local_experts, config.intermediate_size = 64, 32
    batch = MicroBatch(Layout(packed=True, share=True), [(20, 800, 500), (1, 400, 600)])
    args = arguments(tmp_path, chunk_bytes=10**6, router_aux_loss_coef=0.1)
    few = plan.peak_memory(config, args, batch, Auto.from_config)
    tiled = plan.peak_memory(config, args, batch, Auto.from_config, tiles=True)
    assert tiled.total == few.total  # as a run does without tiles rather than without the loss
    monkeypatch.setattr(memory, "_keep_one_of_each_kind", lambda *_: [])
    whole = plan.peak_memory(config, args, batch, Auto.from_config)
    assert few.total == pytest.approx(whole.total, rel=0.001)


def test_garbage_that_is_collected_within_a_segment_is_no_part_of_the_plan(tmp_path, monkeypatch):
    """Layers in tiles are cycles: those that are taken out, since another stands for them, would be collected."""
    args, batch = arguments(tmp_path, **CHECKPOINTED), MicroBatch(Layout(packed=True, share=True), [(20, 80, 50)])
    llama = copy.deepcopy(LLAMA)
    llama.num_hidden_layers = 6
    expected = plan.peak_memory(llama, args, batch, with_lora, tiles=True)
    begin = memory.Ledger._begin

    def and_collect(ledger):
        begin(ledger)
        gc.collect()

    monkeypatch.setattr(memory.Ledger, "_begin", and_collect)
    assert plan.peak_memory(llama, args, batch, with_lora, tiles=True).moments == expected.moments


@pytest.mark.parametrize("build", [Auto.from_config, with_lora], ids=["full", "adapter"])
def test_ranks_share_what_a_sequence_takes(tmp_path, build):
    args = arguments(tmp_path, max_length=4000, **CHECKPOINTED)
    one, two, four = (
        plan.peak_memory(LLAMA, args, MicroBatch(Layout(packed=True, share=True), [(1, 3000, 2600)], ranks), build)
        for ranks in (1, 2, 4)
    )
    trained = sum(p.nbytes for p in build(LLAMA).parameters() if p.requires_grad)
    for several, ranks in ((two, 2), (four, 4)):
        assert several.device["weights"] == one.device["weights"]
        assert several.device["gradients"] - one.device["gradients"] == trained  # DDP's buckets
        moved, expected = ((m.device["activations"] + m.device["other"]) for m in (several, one))
        assert moved == pytest.approx(expected / ranks, rel=0.1)


def test_shards_are_parts_of_weights_gradients_and_optimizer(tmp_path):
    args, batch = arguments(tmp_path), MicroBatch(Layout(packed=True, share=True), [(20, 40, 30)])
    whole, sharded = (plan.peak_memory(LLAMA, args, batch, Auto.from_config, shards=shards) for shards in (1, 4))
    model = Auto.from_config(LLAMA)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    weights = sum(p.nbytes for p in model.parameters())
    gathered = weights - 3 * layer + 2 * layer  # what is in no layer, and two layers
    assert sharded.device["optimizer"] == -(-whole.device["optimizer"] // 4)
    assert sharded.device["weights"] == pytest.approx(weights // 4 + gathered, rel=1e-4)  # and buffers
    assert sharded.total < whole.total


def test_a_plan_for_several_processes_says_so(tmp_path, capsys):
    LLAMA.save_pretrained(tmp_path)
    main(["plan", "--model_name_or_path", str(tmp_path), "--max_length", "64", "--shards", "4", "--parallelism_config",
          '{"sp_size": 2}', "--use_cpu", "True"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "One process (shards on 4, sequences on 2) on cpu" in printed and "no seconds: a step is timed" in printed
    with pytest.raises(SystemExit):
        main(["plan", "--model_name_or_path", str(tmp_path), "--max_length", "64", "--shards", "0"])
    assert "shards must be 1 or more" in capsys.readouterr().err


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
    batch = plan.fullest(args, Layout(packed=True, share=True))
    kept = plan.peak_memory(LLAMA, args, batch, Auto.from_config)
    assert kept.host == 0
    assert kept.device["activations"] - memory.device["activations"] > memory.host / 2


def test_memory_with_an_attention_that_skips_what_is_masked(tmp_path):
    args = arguments(tmp_path)

    def build(attention):
        return lambda config: Auto.from_config(config, attn_implementation=attention)

    batch = plan.fullest(args, Layout(packed=True, share=True))
    assert plan.peak_memory(LLAMA, args, batch, build("flex_attention")) == plan.peak_memory(
        LLAMA, args, batch, build("sdpa")
    )


def test_fullest_keeps_within_the_budget(tmp_path):
    def fullest(layout, **options):
        pairs = plan.fullest(arguments(tmp_path, per_device_train_batch_size=64, **options), layout).pairs
        ((prompt, chosen, rejected),) = {*pairs}
        assert chosen == rejected
        return len(pairs), prompt, chosen

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
    return plan.step_time(config, args, plan.fullest(args, Layout()), Auto.from_config)


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
    text = plan.describe_time(time, tokens=740)
    assert text == "7.4 s a step (3.85 to 22), 100 tokens/s; extrapolated from models of 1 and 4 layers"


def test_time_that_does_not_grow_with_the_layers_is_no_number(tmp_path, monkeypatch):
    turns = {1: [1.0, 2.0, 3.0, 1.0, 1.0], 4: [4.0, 1.9, 2.9, 0.9, 1.2]}  # more: 3, -0.1, -0.1, -0.1, 0.2
    time = step_time(tmp_path, monkeypatch, 24, turns.__getitem__)
    assert time.quartiles is None
    text = plan.describe_time(time, tokens=740)
    assert "no seconds" in text and "1 and 4 layers took equally long" in text and "idle" in text


def test_main_prints_a_plan_without_weights_or_data(tmp_path, capsys, monkeypatch):
    LLAMA.save_pretrained(tmp_path / "model")  # the config alone
    words = f"plan --model_name_or_path {tmp_path / 'model'} --output_dir {tmp_path / 'out'} --use_cpu True"
    monkeypatch.setattr(plan, "_SECONDS", 0.0)
    main([*words.split(), "--max_length", "64", "--per_device_train_batch_size", "1", "--use_peft", "True"])
    printed = capsys.readouterr().out
    assert "steps of 1 pairs of 2 × 64 tokens, packed" in printed and "optimizer" in printed
    assert "tokens/s; measured" in printed and printed.index("optimizer") < printed.index("tokens/s")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="a plan needs --max_length"):
        plan.print_plan(LLAMA, arguments(tmp_path, max_length=None), Auto.from_config, print)
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "hdpo-train plan --model_name_or_path MODEL" in capsys.readouterr().err
