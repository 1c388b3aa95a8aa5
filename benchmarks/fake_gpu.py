"""A GPU that is not there: calls on tensors without numbers, whose every operation is checked and counted.

    with pretended() as gpu:
        hidden, weight = gpu.tensor(N, H, needs_grad=True), gpu.tensor(V, H, needs_grad=True)
        loss = linear_hdpo_loss(hidden, weight, labels, cu_seqlens, gpu.tensor(S, dtype=torch.float32)).loss
        d_hidden, d_weight = gpu.backward(loss, [hidden, weight])
    gpu.operations, gpu.kernels, gpu.pageable, gpu.peak_bytes

The branches that the package takes on CUDA, ROCm or XPU run on torch's FakeTensors: shapes, dtypes and devices are
those of a real call at its real size. These raise: what makes the host wait for the device; a tensor of the host, or of
another device, in an operation; a GEMM that cuBLAS refuses, or whose operands it would copy; a Triton launch whose
arguments do not fit its kernel, whose grid is too large, or which would run on another device than its tensors are on.

Nothing of the package is replaced. What is: the launch of any Triton kernel, Triton's driver, and what torch asks a
device for (the device guard that a build for CPUs lacks, the current device, pinned memory).
"""

import ctypes
import importlib
import inspect
import itertools
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import hdpo_kernels
from hdpo_kernels.ops import bodies

# A kernel is interpreted or not as Triton's settings are when its module is imported; `pretended` changes them.
for _module in pkgutil.walk_packages(hdpo_kernels.__path__, "hdpo_kernels."):
    importlib.import_module(_module.name)

# What Triton is told about the device, by kind.
TARGETS = {
    "cuda": GPUTarget("cuda", 90, 32),
    "hip": GPUTarget("hip", "gfx942", 64),
    "xpu": GPUTarget("xpu", "pvc", 32),
}
MULTIPROCESSORS = 132
LARGEST_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # CUDA's, along each axis
_BLOCK = 512  # bytes: torch's allocator on CUDA rounds every size up to a multiple
_GUARDS = {"cuda": 1, "xpu": 12, "meta": 14}  # c10::DeviceType
_NUM_GUARDS = 21


class FakeGPU(TorchDispatchMode):
    """Runs, while it is active, what torch and Triton are called for. `pretended` makes one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.current = 0  # index of the device that launches go to
        self.operations: Counter[str] = Counter()  # of torch: those that start a kernel or a copy
        self.kernels: Counter[str] = Counter()  # launches of Triton kernels
        self.pageable: list[tuple[int, ...]] = []  # shapes of what was copied from memory that is not pinned
        self.peak_bytes = 0  # in use at a time; `tensor` makes inputs, which do not count
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}  # in use, and bytes
        self._pinned: dict[int, Tensor] = {}  # kept, so that no other storage gets the address

    def tensor(self, *shape: int, dtype: torch.dtype = torch.bfloat16, needs_grad: bool = False) -> Tensor:
        """An input on the device."""
        with self._fake:
            made = torch.empty(shape, dtype=dtype, device=self.device)
        self._add(made, 0)
        return made.requires_grad_(needs_grad)

    @torch.no_grad()
    def backward(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the loss in inputs, which are leaves. Autograd's own engine asks for a device's streams."""
        assert loss.grad_fn is not None
        nodes = _backward_order(loss.grad_fn)
        arriving: dict[Any, list[Any]] = {node: [None] * len(node._input_metadata) for node in nodes}
        arriving[loss.grad_fn][loss.output_nr] = self.tensor(*loss.shape, dtype=loss.dtype)
        for node in nodes:
            if hasattr(node, "variable"):  # where the gradient of a leaf ends
                continue
            wanted: Sequence[bool]
            if isinstance(node, BackwardCFunction):  # has an edge for each tensor, and a result for each argument
                results, wanted = node.apply(*arriving.pop(node)), node.needs_input_grad
            else:
                results, wanted = node(*arriving.pop(node)), [target is not None for target, _ in node.next_functions]
            results = results if isinstance(results, tuple) else (results,)
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            for result, (target, index) in zip(itertools.compress(results, wanted), edges, strict=True):
                if result is not None:
                    present = arriving[target][index]
                    arriving[target][index] = result if present is None else present + result
        found = {id(node.variable): gradient for node, (gradient,) in arriving.items()}
        return [found.get(id(t)) for t in inputs]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in bodies:  # an operator of the package: what it does inside is what is looked at
            with self:
                return bodies[func](*args, **kwargs)
        name, target = func.overloadpacket.__name__, kwargs.get("device")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(isinstance(t, FakeTensor) for t in tensors)
        if func.namespace == "prim":  # asks a tensor for its device
            return self._run(func, args, kwargs)
        if not on_device and (target is None or target.type == "cpu"):
            return self._run_on_host(func, name, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        host = [t for t in tensors if not isinstance(t, FakeTensor) and t.dim()]  # one number is passed by value
        copies = name in ("_to_copy", "copy_")
        to_host = target.type == "cpu" if target is not None else not isinstance(args[0], FakeTensor)
        assert not (copies and to_host), f"{name} to the host, {tuple(args[0].shape)}: waits for the device"
        assert copies or not host, f"{func} reads a tensor on the host, {tuple(host[0].shape)}"
        self.pageable += [tuple(t.shape) for t in host if t.untyped_storage()._cdata not in self._pinned]
        if host:  # a copy: as if it were there already
            there = self._run(torch.empty_like, host, {"device": self.device})
            args = [there if x is host[0] else x for x in args]
        out = _check_product(func, args, kwargs) if name in ("mm", "addmm", "addmm_") else None
        if out is None:
            out = self._run(func, args, kwargs)
        known = {t.untyped_storage()._cdata for t in tensors}
        made = [t for t in tree_leaves(out) if t.untyped_storage()._cdata not in known]
        for t in made:
            self._add(t, -(-t.untyped_storage().nbytes() // _BLOCK) * _BLOCK)
        # Neither views, of which nothing is new, nor allocations start anything.
        if (made and "empty" not in name) or func._schema.is_mutable:
            self.operations[name] += 1
        return out

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with self._fake:
            return func(*args, **kwargs)

    def _run_on_host(self, func, name, args, kwargs):
        if name == "is_pinned":
            return args[0].untyped_storage()._cdata in self._pinned
        if name != "_pin_memory" and not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        out = args[0].clone() if name == "_pin_memory" else func(*args, **{**kwargs, "pin_memory": False})
        self._pinned[out.untyped_storage()._cdata] = out
        return out

    def _add(self, made: Tensor, size: int) -> None:
        self._storages = {key: value for key, value in self._storages.items() if not value[0].expired()}
        storage = made.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage), size
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._storages.values()))

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """In place of Triton's `run`, which `kernel[grid](…)` calls."""
        signature, name = inspect.signature(kernel.fn), kernel.fn.__name__
        options = {key: kwargs.pop(key) for key in set(kwargs) - set(signature.parameters)}
        assert options.keys() <= {"num_warps", "num_stages"}, f"{name} has no arguments {options}"
        bound = signature.bind(*args, **kwargs).arguments
        for key, value in bound.items():
            if isinstance(value, Tensor):
                assert value.device == self.device, f"{name}: {key} is on {value.device}"
                assert self.current == self.device.index, f"{name}: {key} is on {value.device}, not on {self.current}"
            else:
                assert value is None or isinstance(value, int | float), f"{name}: {key} is {value!r}"
        sizes = grid(bound) if callable(grid) else grid
        fits = all(1 <= size <= most for size, most in zip(sizes, LARGEST_GRID, strict=False))
        assert fits, f"{name}: its grid is {sizes}"
        self.kernels[name] += 1

    def exchange(self, index: int) -> int:
        """Make another device the current one, unless index is negative; returns which one was."""
        before, self.current = self.current, index if index >= 0 else self.current
        return before


@contextmanager
def pretended(kind: str = "cuda", index: int = 0) -> Iterator[FakeGPU]:
    """kind: cuda, hip (ROCm, whose devices torch calls cuda) or xpu; index: of the device, while 0 is current."""
    device = torch.device("xpu" if kind == "xpu" else "cuda", index)
    gpu = FakeGPU(device)
    properties = {"multiprocessor_count": MULTIPROCESSORS}
    driver = SimpleNamespace(
        get_current_device=lambda: gpu.current,
        get_current_target=lambda: TARGETS[kind],
        utils=SimpleNamespace(get_device_properties=lambda _: properties),
    )
    namespace = getattr(torch, device.type)
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = False
        replace(triton.runtime.driver, "_active", driver)
        for function in (JITFunction, InterpretedFunction):
            replace(function, "run", lambda kernel, *args, **kwargs: gpu.launch(kernel, *args, **kwargs))
        replace(torch.version, "hip", "7.0" if kind == "hip" else None)
        # Fake tensors would touch a real GPU first, which may have another index.
        replace(torch.accelerator, "current_accelerator", lambda *_: None)
        replace(namespace, "is_available", lambda: False)
        replace(namespace, "_lazy_init", lambda: None)
        replace(namespace, "current_device", lambda: gpu.current)
        for name in ("_exchange_device", "_maybe_exchange_device"):
            replace(namespace, name, gpu.exchange)
        for name in ("_accelerator_exchangeDevice", "_accelerator_maybeExchangeDevice"):
            replace(torch._C, name, gpu.exchange)
        stack.enter_context(_device_guard(device.type))
        stack.enter_context(gpu)
        yield gpu


def check_gemm(a: Tensor, b: Tensor, add: Tensor | None, out: Tensor | None, out_dtype: torch.dtype) -> None:
    """AssertionError if cuBLAS, as torch calls it, refuses a (n, k) @ b (k, m) + add, or copies an operand first."""
    assert a.dtype == b.dtype, f"a is {a.dtype}, b is {b.dtype}"
    assert out_dtype in (a.dtype, torch.float32), f"out_dtype is {out_dtype}, operands are {a.dtype}"
    assert a.shape[1] == b.shape[0], f"{tuple(a.shape)} @ {tuple(b.shape)}"
    if add is not None:  # of the result's dtype since torch 2.10: pytorch#167931
        assert add.dtype in (a.dtype, out_dtype), f"what is added is {add.dtype}, the result {out_dtype}"
    if out is not None:
        assert out.dtype == out_dtype and out.shape == (a.shape[0], b.shape[1]), f"out: {out.dtype} {tuple(out.shape)}"
    for t in (a, b, out):
        if t is not None and t.numel():
            (rows, columns), strides = t.shape, t.stride()
            in_rows = strides[1] == 1 and strides[0] >= max(1, columns)
            in_columns = strides[0] == 1 and strides[1] >= max(1, rows)
            assert in_rows or in_columns, f"operand {tuple(t.shape)} with strides {strides} is copied first"


def _check_product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Checks the GEMM, and returns the tensor that it is told to write, if any: torch 2.11 has no fake for that."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if func.overloadpacket.__name__ == "mm":
        a, b, add = named["self"], named["mat2"], None
    else:
        a, b, add = named["mat1"], named["mat2"], named["self"]
    out = add if func.overloadpacket.__name__ == "addmm_" else named.get("out")
    check_gemm(a, b, add, out, named.get("out_dtype") or a.dtype)
    return out


def _backward_order(root: Any) -> list[Any]:
    """Nodes of autograd's graph, each after all that lead to it."""
    order: list[Any] = []
    seen = {None}

    def visit(node: Any) -> None:
        if node not in seen:
            seen.add(node)
            for target, _ in node.next_functions:
                visit(target)
            order.append(node)

    visit(root)
    return order[::-1]


@contextmanager
def _device_guard(device_type: str) -> Iterator[None]:
    """Autograd asks a device's guard for a stream: lend the device that of meta tensors, which does nothing.

    A build for CPUs has no guard of its own, for which FakeTensorMode makes up only in builds with CUDA.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _NUM_GUARDS).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    number, meta = _GUARDS[device_type], _GUARDS["meta"]
    own = guards[number]
    guards[number] = guards[meta]
    try:
        yield
    finally:
        guards[number] = own
