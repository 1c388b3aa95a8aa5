"""α over a run: schedules, and steering towards an entropy."""

import copy
import itertools
import math

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from hdpo_kernels.pair import PairOptions
from hdpo_train import HDPOConfig, quickstart
from hdpo_train.alpha import EntropyControl, Target, alpha_at
from hdpo_train.loss import StepLoss
from hdpo_train.quickstart import task
from hdpo_train.run.report import read_metrics
from tests.train.test_trainer import losses, make_trainer, plain_losses
from tests.train.tiny import make_model, make_records


def test_alpha_at():
    for schedule in ("linear", "cosine"):
        values = [alpha_at(schedule, 1.2, 0.8, step / 10) for step in range(11)]
        assert values[0] == 1.2 and values[-1] == pytest.approx(0.8) and values[5] == pytest.approx(1.0)
        assert values == sorted(values, reverse=True)
    assert alpha_at("linear", 1.2, 0.8, 0.25) == pytest.approx(1.1)
    assert alpha_at("cosine", 1.2, 0.8, 0.25) == pytest.approx(1.0 + 0.2 * math.cos(math.pi / 4))
    assert alpha_at("constant", 1.2, 1.2, 0.7) == 1.2


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.9", (0.9, True)),
        (0.9, (0.9, True)),
        ("90%", (0.9, True)),
        ("0.65 nats", (0.65, False)),
        ("0.65nat", (0.65, False)),
        ("6 nats", (6.0, False)),
    ],
)
def test_target_parse(text, expected):
    target = Target.parse(text)
    assert target == pytest.approx(expected)
    assert target.nats(0.5) == pytest.approx(0.45 if target.relative else target.value)


@pytest.mark.parametrize("text", ["", "high", "0", "-1", "nan", "inf nats", "0.9 bits", "1e400 nats", "1.2.3"])
def test_target_parse_refuses(text):
    with pytest.raises(ValueError, match="target_entropy"):
        Target.parse(text)


def test_a_large_share_is_taken_for_forgotten_nats():
    with pytest.raises(ValueError, match="write '7 nats'"):
        Target.parse("7")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"alpha_schedule": "step"}, "constant, linear, cosine"),
        ({"alpha_schedule": "linear"}, "alpha_final is where"),
        ({"alpha_final": 0.8}, "alpha_final is where"),
        ({"alpha_schedule": "cosine", "alpha_final": 0.0}, "alpha_final must be from 1e-9 to 1e9"),
        ({"target_entropy": "much"}, "'much'"),
        ({"target_entropy": "0.9", "alpha_schedule": "linear", "alpha_final": 0.8}, "sets alpha itself"),
        ({"target_entropy": "0.9", "alpha": 3.0}, "alpha <= alpha_max"),
        ({"target_entropy": "0.9", "alpha_min": 0.0}, "alpha_min"),
        ({"target_entropy": "0.9", "entropy_steps": 0}, "entropy_steps must be a positive whole number or None, got 0"),
        ({"target_entropy": "0.9", "entropy_prompts": -1}, "entropy_prompts must be a positive whole number, got -1"),
    ],
    ids=str,
)
def test_config_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        HDPOConfig(output_dir="unused", use_cpu=True, **options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_gives_the_steps_of_plain_pytorch(accumulate, tokenizer, config):
    args = config(
        train_sampling_strategy="sequential", max_steps=3, beta=0.5,
        alpha=1.2, alpha_schedule="linear", alpha_final=0.8,
        per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    trainer = make_trainer(args, tokenizer)
    trainer.train()
    lines = [line for line in read_metrics(args.output_dir) if "loss" in line]
    assert [line["alpha"] for line in lines] == pytest.approx([1.2, 1.0, 0.8])
    # Each step alone, from the weights that a constant α = 1.2 does not lead to: all three follow the schedule.
    expected = plain_losses(
        tokenizer, make_records(), make_model(), steps=3, batch=4, lr=1e-3, beta=0.5, alphas=[1.2, 1.0, 0.8]
    )
    assert losses(args.output_dir) == pytest.approx(expected, rel=2e-4, abs=2e-5)
    rewards = [line["rewards/initial_margins"] for line in lines]
    assert rewards[1] == 0 and rewards[0] * rewards[2] < 0  # (α − 1)β(ρ_w − ρ_l), whose sign here is the same in all


def test_a_compiled_model_is_not_compiled_again_for_every_alpha(tokenizer, config):
    options = dict(max_steps=12, alpha_schedule="linear", alpha_final=0.8, output_dir="compiled")
    records = make_records(1) * 48  # one shape
    plain = config(**{**options, "output_dir": config().output_dir})
    make_trainer(plain, tokenizer, records=records).train()
    compiled = config(
        **{**options, "output_dir": plain.output_dir + "-compiled"}, torch_compile=True, torch_compile_backend="eager"
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    make_trainer(compiled, tokenizer, records=records, callbacks=[Count()]).train()
    assert losses(compiled.output_dir) == pytest.approx(losses(plain.output_dir), rel=1e-5)
    assert graphs[0] > 0 and set(graphs) == {graphs[0]} and len(graphs) == 12


STEERED = dict(
    max_steps=10, save_strategy="steps", save_steps=5, target_entropy="0.9", entropy_steps=2, entropy_prompts=6
)
OPTIONS = [dict(max_steps=10, save_strategy="steps", save_steps=5, alpha_schedule="cosine", alpha_final=1.4), STEERED]


@pytest.mark.parametrize("options", OPTIONS, ids=["schedule", "target_entropy"])
def test_a_resumed_run_has_the_alphas_of_an_uninterrupted_one(options, tokenizer, config):
    args = config(**options)
    make_trainer(args, tokenizer).train()
    expected = [line for line in read_metrics(args.output_dir) if "loss" in line]
    make_trainer(args, tokenizer).train(resume_from_checkpoint=args.output_dir + "/checkpoint-5")
    assert [line for line in read_metrics(args.output_dir) if "loss" in line] == expected
    assert len({line["alpha"] for line in expected}) > 3


def test_the_probe_changes_no_step(tokenizer, config):
    """Bounds that leave α = 1 alone: the run is that without a target, dropout's random numbers included."""
    options = dict(max_steps=4, disable_dropout=False)
    plain, probed = config(**options), config(**{**options, "output_dir": config().output_dir + "-probed"})
    probed.target_entropy, probed.alpha_min, probed.alpha_max, probed.entropy_steps = "0.9", 1.0, 1.0, 1
    for args in (plain, probed):
        make_trainer(args, tokenizer, make_model("gpt2")).train()
    assert losses(probed.output_dir) == losses(plain.output_dir)
    line = read_metrics(probed.output_dir)[1]
    assert line["alpha"] == 1 and line["entropy/target"] == pytest.approx(0.9 * line["entropy/policy"])


def test_the_policy_answers_evenly_spaced_prompts_as_long_as_any_completion(tokenizer, config, monkeypatch):
    asked = []

    def own_entropy(model, tokenizer, prompts, max_new_tokens, seed):
        asked.append((prompts, max_new_tokens, seed))
        return 5.0 * len(prompts), len(prompts)

    monkeypatch.setattr("hdpo_train.trainer.own_entropy", own_entropy)
    trainer = make_trainer(config(max_steps=4, target_entropy="0.9", entropy_prompts=3, entropy_steps=2), tokenizer)
    trainer.train()
    data = trainer.train_dataset  # 12 pairs
    longest = max(len(ids) for row in data for ids in (row["chosen_ids"], row["rejected_ids"]))
    assert asked == [([data[row]["prompt_ids"] for row in (0, 4, 8)], longest, 0)] * 3  # at steps 0 and 2, and the end


class Plant:
    """A policy whose ln entropy follows gain · ln α, and is slow to."""

    def __init__(self, gain: float, lag: float, seed: int = 0) -> None:
        self.gain, self.lag, self.value, self.noise = gain, lag, 0.0, torch.Generator().manual_seed(seed)

    def move(self, alpha: float) -> None:
        self.value += (self.gain * math.log(alpha) - self.value) / self.lag

    def __call__(self, model) -> tuple[float, int]:
        noise = 0.005 * torch.randn((), generator=self.noise).item()
        return 100 * 0.7 * math.exp(self.value + noise), 100


def steer(plant: Plant, target: str, probes: int, bounds=(0.4, 2.5)) -> tuple[EntropyControl, list[float]]:
    control = EntropyControl(StepLoss(PairOptions(1.0, 0.1), {}), Target.parse(target), plant, bounds=bounds, every=10)
    args, state, alphas = HDPOConfig(output_dir="unused", use_cpu=True), TrainerState(max_steps=10 * probes), []
    control.on_train_begin(args, state, TrainerControl())
    for step in range(10 * probes):
        state.global_step = step
        control.on_step_begin(args, state, TrainerControl())
        alphas.append(control.loss.alpha)
        if step % 10 == 9:
            plant.move(alphas[-1])
    state.global_step = state.max_steps
    control.on_step_end(args, state, TrainerControl())
    return control, alphas


@pytest.mark.parametrize("gain, lag", [(0.3, 1), (0.3, 3), (0.3, 6), (1.0, 2), (0.15, 3)])
@pytest.mark.parametrize("target", ["0.9", "1.05", "0.63 nats"])
def test_control_reaches_what_can_be_reached(gain, lag, target):
    control, alphas = steer(Plant(gain, lag), target, probes=60)
    assert control.share_of_target() == pytest.approx(1, abs=0.02)
    assert all(0.4 <= alpha <= 2.5 for alpha in alphas)
    assert all(abs(math.log(b / a)) <= control.STEP + 1e-9 for a, b in itertools.pairwise(alphas))


def test_control_stays_at_a_bound_says_so_and_leaves_it_at_once():
    plant = Plant(0.3, 2)
    control, alphas = steer(plant, "0.5", probes=30, bounds=(0.7, 1.5))
    assert alphas[-1] == 0.7 and control.share_of_target() > 1.5
    assert "alpha stands at alpha_min = 0.7" in control.describe()
    control.target = Target.parse("1.0")
    control.on_step_begin(None, TrainerState(max_steps=1000, global_step=300), TrainerControl())
    assert control.loss.alpha > 0.7


def test_control_of_a_run_without_a_step():
    control, _ = steer(Plant(0.3, 2), "0.9", probes=1)
    control.on_train_begin(None, TrainerState(), TrainerControl())
    control.on_train_end(None, TrainerState(), TrainerControl())
    assert "no step was taken" in control.describe()


@pytest.mark.parametrize("probe", [lambda _: (math.nan, 10), lambda _: (0.0, 10)], ids=["nan", "certain"])
def test_control_stops_where_there_is_nothing_to_steer_by(probe):
    control = EntropyControl(StepLoss(PairOptions(1.0, 0.1), {}), Target.parse("0.9"), probe, bounds=(0.5, 2), every=1)
    with pytest.raises(FloatingPointError, match="nothing to steer"):
        control.on_step_begin(None, TrainerState(max_steps=3), TrainerControl())


def test_target_entropy_is_refused_where_weights_are_sharded(tokenizer, config, monkeypatch):
    monkeypatch.setattr("hdpo_train.trainer.shards", lambda _: True)
    with pytest.raises(ValueError, match="use DDP"):
        make_trainer(config(target_entropy="0.9"), tokenizer)


QUICK = quickstart.Settings(
    hidden_size=64, sft_steps=160, sft_batch_size=64, sft_learning_rate=5e-3,
    pair_prompts=1500, batch_size=32, epochs=3, learning_rate=4e-4, held_out=100, eval_samples=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def beads():
    """The quickstart's model before H-DPO, its tokenizer, pairs and held-out prompts."""
    prompts, held_out = task.split_prompts(QUICK.held_out, QUICK.seed)
    model, tokenizer = quickstart.sft(prompts, QUICK)
    return model, tokenizer, quickstart.make_pairs(model, tokenizer, prompts, QUICK), held_out


@pytest.mark.parametrize("target", [0.85, 0.95, 1.05])
def test_the_quickstart_meets_its_target(target, beads, tmp_path):
    """Within 5 %, on prompts and with random numbers that steering did not use."""
    model, tokenizer, records, held_out = beads
    before = quickstart.measure(model, tokenizer, held_out, QUICK).sampled[1.0].entropy.value
    model = copy.deepcopy(model)
    trainer = quickstart.train(model, tokenizer, records, tmp_path, QUICK, target_entropy=str(target))
    after = quickstart.measure(model, tokenizer, held_out, QUICK).sampled[1.0].entropy.value
    print(f"target {target}: {after / before:.3f}; {trainer.entropy_control.describe()}")
    assert after / before == pytest.approx(target, rel=0.05)
    assert trainer.entropy_control.share_of_target() == pytest.approx(1, abs=0.05)
