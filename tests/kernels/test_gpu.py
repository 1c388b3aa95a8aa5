"""What only a GPU can show: bf16 at the sizes of real models, in the GEMMs and kernels that run there."""

import pytest
import torch

from hdpo_kernels import hdpo_loss, linear_hdpo_loss, linear_logp, naive, sequence_sum
from hdpo_kernels.rows import triton as triton_rows
from hdpo_kernels.testing import assert_outcome_as_accurate_as, run, true_outcome, zipf_inputs

pytestmark = pytest.mark.gpu

REAL_VOCABULARIES = [128256, 151936]
OPTIONS = {"alpha": 0.95, "beta": 0.1, "nll_weight": 0.05}


def real_inputs(lengths, vocab, hidden_size=4096):
    """Sequences whose reference is near the policy, so that no pair is saturated and every row has a gradient."""
    inputs = zipf_inputs(lengths, vocab, hidden_size, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        logps = linear_hdpo_loss(*inputs[:4], None).logps
    noise = torch.randn(len(lengths), generator=torch.Generator().manual_seed(0)).cuda()
    return inputs._replace(ref_logps=logps + noise)


@pytest.mark.parametrize("vocab", REAL_VOCABULARIES)
@pytest.mark.parametrize("lengths", [[512] * 16, [4000, 4192]], ids=["8 pairs", "1 long pair"])
def test_linear_hdpo_loss_at_real_sizes_is_as_accurate_as_torch(vocab, lengths):
    inputs = real_inputs(lengths, vocab)
    chunk_bytes = 2**29  # some 1,300 rows: several pieces, and for the long pair parts of a sequence
    actual = run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes, **OPTIONS)
    again = run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes, **OPTIONS)
    for x, y in zip(actual[1:3], again[1:3], strict=True):
        assert torch.equal(x, y), "the same input gives the same bits"
    del again
    baseline = run(naive.linear_hdpo_loss, inputs, **OPTIONS)
    assert_outcome_as_accurate_as(actual, baseline, true_outcome(inputs, **OPTIONS))


def test_linear_logp_of_2048_tokens_in_bf16_is_within_0_02_nat():
    inputs = zipf_inputs([2048] * 4, 128256, 4096, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        logps = sequence_sum(linear_logp(*inputs[:3]).logp, inputs.cu_seqlens)
        exact = inputs.to(torch.float64)
        parts = [naive.linear_logp(exact.hidden[i : i + 512], exact.weight, exact.labels[i : i + 512]).logp
                 for i in range(0, 8192, 512)]  # fmt: skip
        truth = naive.sequence_sum(torch.cat(parts), inputs.cu_seqlens)
    assert (logps - truth).abs().max() < 0.02


def test_linear_hdpo_loss_memory_is_bounded_by_chunk_bytes():
    vocab, chunk_bytes = 128256, 2**28
    inputs = real_inputs([4096, 4096], vocab, 1024)
    torch.cuda.synchronize()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    peak = torch.cuda.max_memory_allocated() - before
    weight_grads = vocab * 1024 * (4 + 2)  # accumulated in fp32, returned in bf16
    assert peak < chunk_bytes + weight_grads + 128 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_sampled_gradient_at_real_sizes_is_reproducible_and_as_close_as_on_paper():
    inputs = real_inputs([512] * 8, 128256)
    outcomes = []
    for _ in range(2):
        torch.manual_seed(0)
        outcomes.append(run(linear_hdpo_loss, inputs, gradient="sampled", **OPTIONS))
    first, again = outcomes
    assert torch.equal(first.d_hidden, again.d_hidden) and torch.equal(first.d_weight, again.d_weight)
    truth = true_outcome(inputs, **OPTIONS)
    for name, error in (("d_hidden", 0.0052), ("d_weight", 0.018)):  # the design's, for fp32 at 1.9 nats
        x, y = getattr(first, name).double(), getattr(truth, name)
        assert (x - y).norm() < 1.5 * error * y.norm(), name


def test_losses_do_not_wait_for_the_device():
    inputs = zipf_inputs([100, 200, 300, 50], 1000, 64, masked=0.3, dtype=torch.bfloat16, device="cuda")
    bias = torch.zeros(1000, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight)]
    logits = (inputs.hidden @ inputs.weight.T).detach().requires_grad_()

    def everything():
        for chunk_bytes in (None, 2**16):
            linear_hdpo_loss(*leaves, *inputs[2:], bias=bias, chunk_bytes=chunk_bytes, nll_weight=0.1).loss.backward()
        token = linear_logp(*leaves, inputs.labels, bias=bias, softcap=3.0)
        sequence_sum(token.logp, inputs.cu_seqlens).sum().backward()
        sampled = {"gradient": "sampled", "epsilon": 2**-6, "bias": bias}
        linear_hdpo_loss(*leaves, *inputs[2:], **sampled).loss.backward()
        hdpo_loss(logits, *inputs[2:]).loss.backward()

    everything()  # compiles kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_row_stats_of_more_than_2_to_the_31_logits():
    n, vocab = 17000, 128256
    inputs = zipf_inputs([n], vocab, 64, dtype=torch.bfloat16, device="cuda")
    logits = inputs.hidden @ inputs.weight.T
    assert logits.numel() > 2**31
    last, labels = logits[-4:].double().requires_grad_(), inputs.labels[-4:]
    truth = naive._token_logp(last, labels, None, 1.0).logp
    stats = triton_rows.row_stats(logits, inputs.labels, grad_out=logits)
    torch.testing.assert_close(stats.logp[-4:].double(), truth.detach(), rtol=0, atol=1e-5)
    (d_last,) = torch.autograd.grad(truth.sum(), last)
    torch.testing.assert_close(logits[-4:].double(), d_last, rtol=2**-8, atol=1e-8)
