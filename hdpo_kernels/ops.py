"""Functions as operators: torch.compile, checkpointing policies and dispatch modes see torch.ops.hdpo.<name> as one.

Operators know no autograd and look at their inputs' values; what surrounds them (autograd.Functions, checks of shapes
and options) is plain Python that torch.compile traces through.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hdpo_kernels.device import on_device

bodies: dict[Any, Callable[..., Any]] = {}  # operator -> what it runs
_PLAIN = (Tensor, torch.nn.Parameter)


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the operator of that name. `fake` takes the same arguments and returns empty results.

    The first argument is a tensor, on the device that all work is done on.
    """

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def run(*args: Any) -> Any:
            with on_device(args[0].device):
                return body(*args)

        op = torch.library.custom_op(f"hdpo::{body.__name__.strip('_')}", run, mutates_args=())
        op.register_fake(fake)
        bodies[op._opoverload] = run

        @functools.wraps(body)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
                return op(*args)
            plain = all(type(a) in _PLAIN for a in args if isinstance(a, Tensor))
            return run(*args) if plain else op(*args)  # nobody looks: the dispatcher's 40 µs are saved

        return call

    return register
