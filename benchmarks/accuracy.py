"""How far are the log-probs of long sequences, and the gradients, from fp64?"""

import torch

from benchmarks.contestants import Problem, make_problem, ours, plain
from benchmarks.harness import Table
from hdpo_kernels import linear_hdpo_loss, naive


def run(table: Table, device: str, quick: bool) -> None:
    vocab, width, length = (4000, 128, 512) if quick else (32000, 512, 2048)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        problem = make_problem(2 * length, vocab, width, 2, device, dtype)
        exact = Problem(*(t.detach().double() if t.is_floating_point() else t for t in problem))
        exact = exact._replace(hidden=exact.hidden.requires_grad_(), weight=exact.weight.requires_grad_())
        with torch.no_grad():  # a reference near the policy: a saturated loss has no gradient to compare
            scores = 0.9 * naive.linear_hdpo_loss(*exact, alpha=0.9, beta=0.1).logps
            problem = problem._replace(ref_logps=(scores + torch.tensor([0.0, 3.0], device=device)).float())
            exact = exact._replace(ref_logps=problem.ref_logps.double())
        truth = naive.linear_hdpo_loss(*exact, alpha=0.9, beta=0.1)
        truth_grads = torch.autograd.grad(truth.loss, (exact.hidden, exact.weight))
        shape = f"2 × {length} tokens, {str(dtype).removeprefix('torch.')}"
        for name, loss, function in (
            ("hdpo_kernels", linear_hdpo_loss, ours),
            ("naive", naive.linear_hdpo_loss, plain),
        ):
            with torch.no_grad():
                off = (loss(*problem, alpha=0.9, beta=0.1).logps.double() - truth.logps).abs().max().item()
            table.add("accuracy", shape, name, "log-prob of a sequence", off, "nat")
            for what, grad, exact_grad in zip(
                ("d_hidden", "d_weight"), function(problem)[1:], truth_grads, strict=True
            ):
                error = ((grad.double() - exact_grad).norm() / exact_grad.norm()).item()
                table.add("accuracy", shape, name, f"{what}, relative", error, "")
