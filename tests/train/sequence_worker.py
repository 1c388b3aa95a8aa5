"""Run by test_sequence_ranks.py with gloo processes: python sequence_worker.py FOLDER MODE …"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hdpo_train.data.tokenize import PairCollator
from hdpo_train.model.head import attach_loss, model_inputs
from hdpo_train.model.packing import Layout, use_layout
from hdpo_train.model.sequence_ranks import SequenceRanks, check_model, probe
from tests.train.distributed_worker import allow_fsdp_on_cpu, reference, train
from tests.train.tiny import make_model

_SIZE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE, num_key_value_heads=2)),
    "one key head": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE, num_key_value_heads=1)),
    "windows, softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SIZE, num_key_value_heads=2, head_dim=8, sliding_window=16, attn_logit_softcapping=5.0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=512)),
}
LENGTHS = {  # of prompt, chosen and rejected
    "unequal": [(3, 40, 1), (70, 2, 33), (1, 1, 2)],
    "labels on the last rank alone": [(150, 2, 3)],  # with shared prompts
    "fewer tokens than ranks": [(1, 1, 1)],
}
CASES = {  # of distributed_worker, options
    "odd last batch": {},  # evaluates
    "a rank without pairs": {},  # accumulates
    "adapter": {},
    "tiles": {},
    "even": {"max_tokens_per_batch": 80},
}


def gradients(ranks: SequenceRanks) -> None:
    """Loss, log-probs, entropies and the gradient of every parameter are those of one process."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()  # without dropout
        attach_loss(model)
        for share in (True, False):
            layout = Layout(packed=True, share=share)
            use_layout(model, layout)
            check_model(model, layout, ranks.size, longest=110)
            probe(model, layout, ranks)
            for kind, lengths in LENGTHS.items():
                ids = torch.Generator().manual_seed(1)
                rows = [[torch.randint(97, (n,), generator=ids).tolist() for n in pair] for pair in lengths]
                keys = ("prompt_ids", "chosen_ids", "rejected_ids")
                batch = PairCollator(0, layout)([dict(zip(keys, row, strict=True)) for row in rows])
                batch["ref_logps"] = -10 - torch.arange(2.0 * len(rows))
                compare(model, batch, ranks, f"{name}, {kind}, share={share}")


def compare(model, batch, ranks: SequenceRanks, where: str) -> None:
    results, grads = [], []
    for each in (None, ranks):
        model.zero_grad()
        result = model(**model_inputs(batch, torch.device("cpu"), {"alpha": 0.9, "beta": 0.5, "nll_weight": 0.1}, each))
        result.loss.backward()
        results.append(result)
        grads.append([p.grad.clone() for p in model.parameters()])
    for field in ("loss", "logps", "entropy", "margins"):
        mine, expected = (getattr(result, field) for result in reversed(results))
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5, msg=f"{where}: {field}")
    for (parameter, _), expected, mine in zip(model.named_parameters(), *grads, strict=True):
        dist.all_reduce(mine, group=ranks.group)
        scale = expected.abs().max()
        assert (mine - expected).abs().max() <= 1e-5 * scale + 1e-8, f"{where}: gradient of {parameter}"


def refusals(ranks: SequenceRanks) -> None:
    """What cannot be split is refused on all ranks alike."""
    packed = Layout(packed=True, share=True)
    sinks = GptOssForCausalLM(
        GptOssConfig(**_SIZE, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    )
    three = LlamaForCausalLM(LlamaConfig(**{**_SIZE, "hidden_size": 48, "num_attention_heads": 3}))
    flex = make_model()
    flex.set_attn_implementation("flex_attention")
    for model, layout, words in (
        (three, packed, "3 cannot be divided"),
        (make_model(), Layout(), "needs packed rows"),
        (flex, packed, "flex_attention"),
        (sinks, packed, "GptOssForCausalLM cannot be split"),
    ):
        use_layout(model, layout)
        try:
            check_model(model, layout, ranks.size, longest=100)
            probe(model, layout, ranks)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"not refused: {words}")


def trainer(folder: Path, sharded: bool = False) -> None:
    world = int(os.environ["WORLD_SIZE"])
    try:
        train(folder, "even", world // 2, parallelism_config={"sp_size": 2}, loss_type=f"{__file__}:compare")
    except ValueError as error:
        assert "function of your own" in str(error), error
    else:
        raise AssertionError("not refused: a loss function")
    train(folder, "sampled", world // 2, parallelism_config={"sp_size": 2})  # which asserts equal parameters
    for case, options in CASES.items():
        if "max_tokens_per_batch" in options and world > 2:
            continue  # one process makes other batches of a budget than two ranks of data
        if sharded:
            AcceleratorState._reset_state()
        run, steps = train(folder, case, world // 2, parallelism_config={"sp_size": 2}, **options)
        assert isinstance(run.model_wrapped, FSDPModule) == sharded
        assert run.sequence_ranks.size == 2 and run.layout.share
        run.save_model(str(folder / case / "model"))
        if dist.get_rank() == 0:
            torch.save((steps, reference(run)), folder / case / "result.pt")


def fsdp(folder: Path) -> None:
    """As accelerate launch sets the environment from configs/sp.yaml."""
    allow_fsdp_on_cpu()
    options = yaml.safe_load((Path(__file__).parents[2] / "configs" / "sp.yaml").read_text())["fsdp_config"]
    os.environ.update({key.upper(): str(value) for key, value in options.items()}, ACCELERATE_USE_FSDP="true")
    trainer(folder, sharded=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    group = SequenceRanks(dist.group.WORLD)
    gradients(group)
    refusals(group)
    trainer(folder / "ddp")
    fsdp(folder / "fsdp")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # see distributed_worker
