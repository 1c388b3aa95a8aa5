"""What stands in for TRL's chunked log-prob function gives what that gives, and refuses what it cannot."""

import pytest
import torch

from hdpo_train.in_trl import _score, linear_logp_in_trl

trl = pytest.importorskip("trl")
seam = pytest.importorskip("trl.trainer.utils")
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
V, H, N = 503, 32, 700
PLAIN = (1.0, 128, None, 1.0)  # temperature, vocab_tile, softcap, logit_scale


def make_inputs(spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias and labels; of the labels a third each the likeliest token, drawn, and any."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, H), spread * torch.randn(V, H) / H**0.5, torch.randn(V)
    logits = hidden @ weight.T
    drawn = torch.multinomial(torch.softmax(logits, 1), 1).squeeze(1)
    kinds = torch.stack([logits.argmax(1), drawn, torch.randint(V, (N,))])
    return *(t.requires_grad_() for t in (hidden, weight, bias)), kinds[torch.arange(N) % 3, torch.arange(N)]


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0], ids=["all equal", "flat", "peaked"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("head", [(None, 1.0), (20.0, 0.7)], ids=["", "softcap"])
def test_score_gives_what_the_function_of_trl_gives(spread, with_bias, head):
    hidden, weight, bias, labels = make_inputs(spread)
    leaves = [hidden, weight, bias][: 2 + with_bias]
    arguments = (hidden, weight, bias if with_bias else None, labels, 1.0, 128, *head, OUTPUTS)
    ours, theirs = _score({}, *arguments), seam._ChunkedLogProbFunction.apply(*arguments)
    top1 = theirs[4] if with_bias or spread else torch.ones_like(theirs[4])  # of tied tokens, TRL takes the first alone
    assert ours[2] is theirs[2] is None and torch.equal(ours[4], top1) and 0 < theirs[4].sum() < N
    assert torch.allclose(ours[0], theirs[0], atol=2e-6, rtol=1e-6)
    assert torch.allclose(ours[1], theirs[1], atol=1e-5, rtol=1e-6)
    assert ours[3].isnan().all() if head[0] else torch.allclose(ours[3], theirs[3], atol=1e-6)
    d_logp = torch.randn(N)
    grads = [torch.autograd.grad(logp, leaves, d_logp) for logp in (ours[0], theirs[0])]
    for mine, its in zip(*grads, strict=True):
        assert torch.allclose(mine, its, atol=2e-6 * float(its.abs().max()) + 1e-12)


def test_score_gives_only_what_is_asked_for():
    assert [x is not None for x in _score({}, *make_inputs(), *PLAIN, ("log_probs",))] == [True, *[False] * 4]


@pytest.mark.parametrize(
    ("temperature", "outputs", "ds_id", "message"),
    [
        (1.0, (*OUTPUTS, "log_sum_sq_probs"), {}, "no log_sum_sq_probs: set use_weighting=False, or"),
        (0.5, OUTPUTS, {}, "DPOTrainer, which has no temperature, got 0.5"),
        (1.0, OUTPUTS, {"ds_id": 3}, "ZeRO-3 takes the head's weight away"),
    ],
)
def test_score_refuses_what_it_cannot_do(temperature, outputs, ds_id, message):
    hidden, weight, bias, labels = make_inputs()
    weight.__dict__.update(ds_id)  # as DeepSpeed marks the weights that it takes apart
    with pytest.raises(NotImplementedError, match=message):
        _score({}, hidden, weight, bias, labels, temperature, *PLAIN[1:], outputs)


def test_linear_logp_in_trl_refuses_other_versions_and_bad_options_and_leaves_nothing_behind(monkeypatch):
    before = seam._ChunkedLogProbFunction
    for options in ({"gradient": "rough"}, {"gradient": "sampled", "epsilon": 2.0}, {"chunk_bytes": 0}):
        with pytest.raises(ValueError, match=next(reversed(options))), linear_logp_in_trl(**options):
            pass
    with linear_logp_in_trl():
        assert seam._ChunkedLogProbFunction is not before
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    with pytest.raises(RuntimeError, match=r"TRL 1\.16\.\*, and 1\.15\.0 is installed"), linear_logp_in_trl():
        pass
    assert seam._ChunkedLogProbFunction is before
