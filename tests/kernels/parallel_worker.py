"""Run by test_parallel.py under torchrun: heads on several ranks against the same head on one."""

import itertools
import os

import torch
import torch.distributed as dist

# torch imports this later, when a group is there; it would be a default argument then and stay alive, with its threads,
# beyond destroy_process_group, and a thread of gloo that meets the end of Python takes the process down (SIGABRT).
import torch.distributed.nn.functional

from hdpo_kernels import linear_hdpo_loss
from hdpo_kernels.testing import HeadInputs, run, zipf_inputs

V, H = 97, 24
LENGTHS = [9, 11, 0, 5, 30, 26, 2, 2]
OPTIONS = {
    "plain": {},
    "long pairs": {"chunk_bytes": 8 * V * 4},
    "softcap, nll": {"softcap": 6.0, "logit_scale": 0.7, "nll_weight": 0.3, "chunk_bytes": 8 * V * 4},
    "ipo": {"loss_type": "ipo", "alpha": 0.8},
    "by token": {"alpha_level": "token", "alpha": 0.6, "nll_weight": 0.3, "chunk_bytes": 8 * V * 4},
}


def shards(vocab: int, ranks: int) -> list[slice]:
    """Uneven where it does not divide."""
    return [slice(vocab * r // ranks, vocab * (r + 1) // ranks) for r in range(ranks)]


def tokens_of(rank: int, ranks: int, cu_seqlens: list[int]) -> tuple[list[int], list[int]]:
    """Rows and boundaries of a rank: a run of each sequence; short sequences are not on every rank."""
    rows, bounds = [], [0]
    for start, end in itertools.pairwise(cu_seqlens):
        length = end - start
        rows += range(start + length * rank // ranks, start + length * (rank + 1) // ranks)
        bounds.append(len(rows))
    return rows, bounds


def close(actual, expected, message: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: (1e-4, 1e-6), torch.bfloat16: (2e-2, 2e-2)}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance[0], atol=tolerance[1], msg=lambda m: f"{message}: {m}")


def compare(name: str, options: dict, tp, sp, dtype: torch.dtype, bias: torch.Tensor | None, masked: float) -> None:
    inputs = zipf_inputs(LENGTHS, V, H, masked=masked, dtype=dtype, seed=1)
    bias = None if bias is None else bias.to(dtype)
    whole = run(linear_hdpo_loss, inputs, bias=bias, **options)

    part = slice(None) if tp is None else shards(V, dist.get_world_size(tp))[dist.get_rank(tp)]
    rows, bounds = list(range(sum(LENGTHS))), inputs.cu_seqlens
    if sp is not None:
        rows, bounds = tokens_of(dist.get_rank(sp), dist.get_world_size(sp), inputs.cu_seqlens)
    mine = HeadInputs(inputs.hidden[rows], inputs.weight[part], inputs.labels[rows], bounds, inputs.ref_logps)
    mine_bias = None if bias is None else bias[part]
    local = run(linear_hdpo_loss, mine, bias=mine_bias, tp_group=tp, sp_group=sp, **options)

    for field, x, y in zip(whole.result._fields, local.result, whole.result, strict=True):
        close(x, y, f"{name}, {field}", dtype)
        everywhere = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, x.contiguous())
        assert all(torch.equal(x, other) for other in everywhere), f"{name}: ranks differ in {field}"
    close(local.d_hidden, whole.d_hidden[rows], f"{name}, d_hidden", dtype)
    for field, x, y in (("d_weight", local.d_weight, whole.d_weight), ("d_bias", local.d_bias, whole.d_bias)):
        if x is None:
            continue
        x = x.float()
        if sp is not None:
            dist.all_reduce(x, group=sp)
        close(x, y[part].float(), f"{name}, {field}", dtype)


def compare_sampled(sp) -> None:
    """Ranks draw for their own tokens, so only the exact forward and the size of the noise can be compared."""
    inputs = zipf_inputs(LENGTHS, V, H, seed=1)
    whole = run(linear_hdpo_loss, inputs)
    rows, bounds = tokens_of(dist.get_rank(sp), dist.get_world_size(sp), inputs.cu_seqlens)
    mine = HeadInputs(inputs.hidden[rows], inputs.weight, inputs.labels[rows], bounds, inputs.ref_logps)
    torch.manual_seed(dist.get_rank())
    local = run(linear_hdpo_loss, mine, sp_group=sp, gradient="sampled", epsilon=1 / 90)
    for field, x, y in zip(whole.result._fields, local.result, whole.result, strict=True):
        close(x, y, f"sampled, {field}", torch.float32)
    dist.all_reduce(local.d_weight, group=sp)
    for x, y in ((local.d_hidden, whole.d_hidden[rows]), (local.d_weight, whole.d_weight)):
        assert (x - y).norm() < 0.1 * y.norm(), (x - y).norm() / y.norm()


def refusals(world) -> None:
    inputs = zipf_inputs([5, 6], V, H)
    for options, words in (
        ({"gradient": "sampled", "epsilon": 0.1, "tp_group": world}, "use gradient='exact'"),
        ({"labels": inputs.labels + 2 * V, "tp_group": world}, "outside the vocabulary of 194"),
    ):
        if dist.get_world_size() != 2:
            continue
        try:
            linear_hdpo_loss(**{**inputs._asdict(), **options})
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{words!r} was not raised")


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    world = dist.group.WORLD
    ranks = dist.get_world_size()
    grid = [(world, None), (None, world)]
    if ranks == 4:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "sp"))
        grid = [*grid, (mesh["tp"].get_group(), mesh["sp"].get_group())]
    for tp, sp in grid:
        kind = f"tp {tp and tp.size()} sp {sp and sp.size()}"
        for name, options in OPTIONS.items():
            bias = torch.linspace(-1, 1, V) if name == "softcap, nll" else None
            compare(f"{kind}, {name}", options, tp, sp, torch.float32, bias, masked=0.2)
        compare(f"{kind}, bf16", {}, tp, sp, torch.bfloat16, None, masked=0.0)
        compare(f"{kind}, nothing scored", {}, tp, sp, torch.float32, None, masked=1.0)
    compare_sampled(world)
    refusals(world)
    if os.environ["RANK"] == "0":
        print("compared")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
