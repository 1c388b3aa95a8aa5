"""Sums over the tokens of each sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdpo_kernels.checks import as_boundaries, boundaries
from hdpo_kernels.ops import operator
from hdpo_kernels.rows import backend


def sequence_sum(values: Tensor, cu_seqlens: Tensor | Sequence[int]) -> Tensor:
    """Sum of `values` over each sequence; differentiable.

    Args:
        values: (N,) floating, one number a token.
        cu_seqlens: (S + 1,) int, the boundaries 0 = b₀ ≤ b₁ … ≤ b_S = N; a list or a tensor on the CPU (a tensor on
            another device costs one sync).

    Returns:
        (S,) in fp32 (fp64 for fp64 values).

    Raises:
        ValueError: values is not one-dimensional, or the boundaries do not cover it.
    """
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"values must be a floating tensor of shape (N,), got {values.dtype} {tuple(values.shape)}")
    return SequenceSum.apply(values, as_boundaries(cu_seqlens))


def _fake_sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.promote_types(values.dtype, torch.float32))


@operator(_fake_sequence_sum)
def _sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    values = values.to(torch.promote_types(values.dtype, torch.float32)).contiguous()
    return backend(values).sequence_sum(values, boundaries(cu_seqlens, values.shape[0]))


def _fake_sequence_spread(values: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    return values.new_empty(num_rows)


@operator(_fake_sequence_spread)
def _sequence_spread(values: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    return backend(values).sequence_spread(values, cu_seqlens.tolist())


class SequenceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.cu_seqlens, ctx.dtype, ctx.num_rows = cu_seqlens, values.dtype, values.shape[0]
        return _sequence_sum(values, cu_seqlens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return SequenceSpread.apply(grad, ctx.cu_seqlens, ctx.num_rows).to(ctx.dtype), None


class SequenceSpread(torch.autograd.Function):
    """The adjoint of the sum: each row has its sequence's value."""

    @staticmethod
    def forward(ctx, values: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
        ctx.cu_seqlens = cu_seqlens
        return _sequence_spread(values, cu_seqlens, num_rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return SequenceSum.apply(grad, ctx.cu_seqlens), None, None
