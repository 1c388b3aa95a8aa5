"""The functions inside torch.compile, checkpointing, autocast and gradient accumulation."""

import contextlib
import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hdpo_kernels import hdpo_loss, linear_hdpo_loss, linear_logp, pair_loss, sequence_sum
from hdpo_kernels.pair import PairOptions
from hdpo_kernels.testing import Operations, zipf_inputs

N, V, H = 60, 101, 16
INPUTS = zipf_inputs([20, 10, 14, 16], V, H, masked=0.2)
CU_SEQLENS = torch.tensor(INPUTS.cu_seqlens)
GEMM = 2 * N * V * H
LOSS_NUMBERS = PairOptions(0.9, 0.1, "sigmoid", 0.1, 0.05, "token").numbers


def leaves(dtype=torch.float32):
    bias = torch.linspace(-1, 1, V)
    return [t.to(dtype).clone().requires_grad_() for t in (INPUTS.hidden, INPUTS.weight, bias)]


def from_hidden(hidden, weight, bias, labels, cu_seqlens, ref_logps):
    result = linear_hdpo_loss(
        hidden * 1.5, weight, labels, cu_seqlens, ref_logps, bias=bias, softcap=20.0, logit_scale=0.9, alpha=0.9
    )
    return 3 * result.loss, *result[1:]


def from_logits(hidden, weight, bias, labels, cu_seqlens, ref_logps, inplace=False):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    result = hdpo_loss(
        logits, labels, cu_seqlens, ref_logps, alpha=0.9, nll_weight=0.1, alpha_level="token", inplace=inplace
    )
    return 3 * result.loss, *result[1:]


def from_logits_inplace(*args):
    return from_logits(*args, inplace=True)


def sampled(hidden, weight, bias, labels, cu_seqlens, ref_logps):
    result = linear_hdpo_loss(
        hidden * 1.5, weight, labels, cu_seqlens, ref_logps, bias=bias, softcap=20.0, gradient="sampled", epsilon=2**-5
    )
    return 3 * result.loss, *result[1:]


def in_parts(hidden, weight, bias, labels, cu_seqlens, ref_logps):
    token = linear_logp(hidden, weight, labels, bias=bias)
    logps, lengths = sequence_sum(token.logp, cu_seqlens), sequence_sum((labels >= 0).float(), cu_seqlens)
    result = pair_loss(logps, ref_logps, alpha=0.9, beta=0.2, loss_type="ipo", lengths=lengths)
    return result.loss, token.entropy.detach(), *(t for t in result[1:] if t is not None)


FUNCTIONS = [from_hidden, from_logits, from_logits_inplace, in_parts, sampled]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", FUNCTIONS)
@torch._inductor.config.patch(fallback_random=True)  # the numbers that eager draws
def test_functions_compile_to_one_graph_with_the_same_results(function, backend):
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected_inputs, inputs = leaves(), leaves()
    torch.manual_seed(0)
    expected = function(*expected_inputs, INPUTS.labels, CU_SEQLENS, INPUTS.ref_logps)
    torch.manual_seed(0)
    actual = compiled(*inputs, INPUTS.labels, CU_SEQLENS, INPUTS.ref_logps)
    torch.testing.assert_close(actual, expected)
    assert [t.requires_grad for t in actual] == [t.requires_grad for t in expected]
    expected[0].backward(), actual[0].backward()
    for x, y in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_compiled_loss_takes_other_lengths_without_compiling_again():
    compiled = torch.compile(from_hidden, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([5, 6], [9, 7], [11, 3]):
        inputs = zipf_inputs(lengths, V, H)
        arguments = (*inputs[:2], None, inputs.labels, torch.tensor(inputs.cu_seqlens), inputs.ref_logps)
        with torch.compiler.set_stance("fail_on_recompile") if lengths == [11, 3] else contextlib.nullcontext():
            torch.testing.assert_close(compiled(*arguments), from_hidden(*arguments))


def test_compiled_loss_still_refuses_bad_labels_and_boundaries():
    compiled = torch.compile(from_hidden, fullgraph=True, backend="aot_eager")
    labels = INPUTS.labels.clone()
    labels[3] = V
    with pytest.raises(ValueError, match=f"label {V} at row 3 is outside"):
        compiled(*leaves(), labels, CU_SEQLENS, INPUTS.ref_logps)
    with pytest.raises(ValueError, match="must not decrease"):
        compiled(*leaves(), INPUTS.labels, CU_SEQLENS[[0, 2, 1, 3, 4]], INPUTS.ref_logps)


def test_compiled_gradient_into_entropy_is_nan_not_lost():
    def loss(hidden):
        token = linear_logp(hidden, INPUTS.weight, INPUTS.labels)
        return token.logp.sum() + token.entropy.sum()

    hidden = leaves()[0]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden).backward()
    assert hidden.grad[INPUTS.labels >= 0].isnan().all()


@pytest.mark.parametrize("needs", [[False] * 3, [True, False, False], [True] * 3], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_operators_pass_opcheck(needs, bias):
    hidden, weight, b = (t.detach() for t in leaves())
    hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T  # results have their own strides
    b, needs = (b, needs) if bias else (None, [*needs[:2], False])
    head = (30.0, 1.0, 4 * V * 8)
    ops = torch.ops.hdpo
    draws = torch.arange(N) * (2**32 // N)
    entries = ops.linear_logp(hidden, weight, b, INPUTS.labels, draws, 2**-5, *head, torch.float32)[-1]
    calls = [
        (ops.linear_hdpo_loss, (hidden, weight, b, INPUTS.labels, INPUTS.ref_logps, CU_SEQLENS, *head, LOSS_NUMBERS,
                                None, None, torch.float32, needs)),
        (ops.hdpo_loss, (hidden @ weight.T, INPUTS.labels, None, CU_SEQLENS, *head[:2], LOSS_NUMBERS, needs[0])),
        (ops.linear_logp, (hidden, weight, b, INPUTS.labels, None, 0.5, *head, torch.bfloat16)),
        (ops.linear_logp, (hidden, weight, b, INPUTS.labels, draws, 2**-5, *head, torch.bfloat16)),
        (ops.linear_logp_backward, (torch.ones(N), hidden, weight, b, INPUTS.labels, [], *head, torch.float32, needs)),
        (ops.linear_logp_backward, (torch.ones(N), hidden, weight, b, INPUTS.labels, entries, *head, torch.float32,
                                    needs)),
        (ops.sequence_sum, (torch.ones(N, dtype=torch.bfloat16), CU_SEQLENS)),
    ]  # fmt: skip
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def gemms(function, *arguments, **options) -> float:
    """Head GEMMs that forward and backward of a scalar function run."""
    with Operations() as operations:
        function(*arguments, **options).backward()
    return operations.gemm_flops / GEMM


def test_checkpointed_loss_does_not_run_its_gemms_twice():
    labels = INPUTS.labels.clamp(min=0)

    def region(hidden, weight):
        hidden = torch.nn.functional.layer_norm(hidden, (H,)).sin()  # saved for backward, hence made again
        return linear_hdpo_loss(hidden, weight, labels, CU_SEQLENS, INPUTS.ref_logps).loss

    hidden, weight, _ = leaves()
    assert gemms(region, hidden, weight) == 3
    expected = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    assert gemms(checkpoint, region, hidden, weight, use_reentrant=False) == 3
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])
    assert gemms(checkpoint, region, hidden, weight, use_reentrant=True) == 4  # its first pass has no gradients


def test_a_sampled_gradient_is_the_same_under_checkpointing():
    def region(hidden, weight):
        token = linear_logp(hidden.sin(), weight, INPUTS.labels, gradient="sampled", epsilon=2**-5)
        return token.logp.sum().sin()

    grads = []
    for call in (region, *(functools.partial(checkpoint, region, use_reentrant=r) for r in (False, True))):
        hidden, weight, _ = leaves()
        torch.manual_seed(0)
        call(hidden, weight).backward()
        grads.append((hidden.grad, weight.grad))
    for other in grads[1:]:
        assert torch.equal(other[0], grads[0][0]) and torch.equal(other[1], grads[0][1])


def test_selective_checkpointing_can_keep_what_the_operators_return():
    labels = INPUTS.labels.clamp(min=0)

    def region(hidden, weight):
        logps = sequence_sum(linear_logp(hidden.sin(), weight, labels).logp, CU_SEQLENS)
        return pair_loss(logps, INPUTS.ref_logps, alpha=0.9, beta=0.1).loss.sin().exp()

    def policy(ctx, op, *args, **kwargs):
        kept = op in (torch.ops.hdpo.linear_logp.default,)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    hidden, weight, _ = leaves()
    assert gemms(checkpoint, region, hidden, weight, use_reentrant=False) == 5
    kept = gemms(
        checkpoint, region, hidden, weight, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    assert kept == 4


@pytest.mark.filterwarnings("error:Dynamo detected")  # a cache that it would not see
def test_pair_loss_compiles_without_a_warning():
    def loss(logps):
        return pair_loss(logps, None, alpha=0.9, beta=0.1, loss_type=["sigmoid", "apo_zero"]).loss

    logps = torch.randn(4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logps), loss(logps))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("function", [from_hidden, in_parts])
def test_functions_under_autocast_equal_cast_inputs(function, compiled):
    cast = leaves(torch.bfloat16)
    rest = (INPUTS.labels, CU_SEQLENS, INPUTS.ref_logps)
    expected = function(*cast, *rest)
    expected[0].backward()
    inputs = leaves()
    call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = call(*inputs, *rest)
    actual[0].backward()
    torch.testing.assert_close(actual[0], expected[0], rtol=2e-2, atol=1e-3)
    for x, y in zip(inputs, cast, strict=True):
        assert x.grad.dtype == torch.float32
        assert (x.grad - y.grad).norm() < 2e-2 * y.grad.norm()


def test_gradient_accumulates_over_micro_batches():
    whole, parts = leaves(), leaves()
    rest = (INPUTS.labels, CU_SEQLENS, INPUTS.ref_logps)
    from_hidden(*whole, *rest)[0].backward()
    middle = INPUTS.cu_seqlens[2]
    for rows, seqs in ((slice(0, middle), slice(0, 2)), (slice(middle, N), slice(2, 4))):
        bounds = CU_SEQLENS[seqs.start : seqs.stop + 1] - rows.start
        part = from_hidden(parts[0][rows], *parts[1:], INPUTS.labels[rows], bounds, INPUTS.ref_logps[seqs])
        (part[0] / 2).backward()
    for x, y in zip(parts, whole, strict=True):
        torch.testing.assert_close(x.grad, y.grad)
