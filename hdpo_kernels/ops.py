"""Functions as operators: torch.compile, checkpointing policies and dispatch modes see torch.ops.hdpo.<name> as one.

Operators know no autograd and look at their inputs' values; what surrounds them (autograd.Functions, checks of shapes
and options) is plain Python that torch.compile traces through.
"""

from collections.abc import Callable
from typing import Any

import torch

bodies: dict[Any, Callable[..., Any]] = {}  # operator -> what it runs


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the operator of that name. `fake` takes the same arguments and returns empty results."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"hdpo::{body.__name__.strip('_')}", body, mutates_args=())
        op.register_fake(fake)
        bodies[op._opoverload] = body
        return op

    return register
