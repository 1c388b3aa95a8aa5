"""What `hdpo-train plan` says against what a step really takes."""

import copy

import pytest
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config, GPT2Config, LlamaConfig

from hdpo_kernels import lm_head
from hdpo_train import HDPOConfig, plan

LLAMA = LlamaConfig(
    vocab_size=8000, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
GEMMA2 = Gemma2Config(
    vocab_size=8000, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=256, final_logit_softcapping=30.0,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=8000, n_embd=128, n_layer=3, n_head=4, n_positions=256)


def arguments(tmp_path, **options) -> HDPOConfig:
    given = dict(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, max_length=96)
    return HDPOConfig(**{**given, **options})


def measured_peak(config, args: HDPOConfig) -> int:
    """Bytes of tensors alive at the peak of the second step, as torch's allocator saw them."""
    lm_head._kept.__dict__.clear()
    model = plan._prepare(plan.AutoModelForCausalLM.from_config(config), args)
    optimizer = plan._optimizer(model, args)

    def step() -> None:
        for _ in range(args.gradient_accumulation_steps):
            plan._micro_batch(model, args, "cpu")
        optimizer.step()
        optimizer.zero_grad()

    step()
    there = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    before = sum(t.nbytes for t in there) + lm_head._kept.memory.nbytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return before + peak


@pytest.mark.parametrize("config", [LLAMA, GEMMA2, GPT2], ids=["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 3}, {"gradient": "sampled", "epsilon": 0.01},
     {"bf16": True}, {"optim": "sgd"}],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_memory_is_within_15_percent_of_what_a_step_takes(tmp_path, config, options):
    args = arguments(tmp_path, **options)
    planned = sum(plan.peak_memory(config, args, plan.AutoModelForCausalLM.from_config).values())
    measured = measured_peak(config, args)
    assert abs(planned - measured) < 0.15 * measured, f"{planned / 2**20:.1f} MiB planned, {measured / 2**20:.1f} taken"


@pytest.mark.parametrize("layers", [2, 4, 7])
def test_time_is_linear_in_the_layers(tmp_path, monkeypatch, layers):
    monkeypatch.setattr(plan, "_time", lambda model, args: 1.0 + 0.25 * model.config.num_hidden_layers)
    config = copy.deepcopy(LLAMA)
    config.num_hidden_layers = layers
    seconds = plan.step_seconds(config, arguments(tmp_path), plan.AutoModelForCausalLM.from_config)
    assert seconds == pytest.approx(1.0 + layers * 0.25)


def test_main_prints_a_plan_without_weights_or_data(tmp_path, capsys):
    from hdpo_train.__main__ import main

    LLAMA.save_pretrained(tmp_path / "model")  # the config alone
    words = f"plan --model_name_or_path {tmp_path / 'model'} --output_dir {tmp_path / 'out'} --use_cpu True"
    main([*words.split(), "--max_length", "64", "--per_device_train_batch_size", "1"])
    printed = capsys.readouterr().out
    assert "steps of 1 pairs of 2 × 64 tokens" in printed and "optimizer" in printed and "tokens/s" in printed
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main([*words.split(), "--use_peft", "True"])
    assert "without --use_peft it is an upper bound" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a plan needs --max_length"):
        plan.make_plan(LLAMA, arguments(tmp_path, max_length=None))
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "hdpo-train plan --model_name_or_path MODEL" in capsys.readouterr().err
