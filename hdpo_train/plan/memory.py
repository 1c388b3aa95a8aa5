"""Memory of an optimizer step by kind, found in seconds, without weights and without computation.

The step is run on tensors that have a size but no memory (FakeTensorMode), while a ledger adds up what is alive. Layers
that are alike take the same: one of each kind is run, and what it adds is counted as often as the model has it.

    model ── fake copy ── optimizer's step ───────────────────────────────────────────────> bytes at its peak
                       └─ forward and backward of one layer of each kind ── over all layers ─> … at theirs
"""

import contextlib
import copy
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from hdpo_kernels.workspace import head_workspace_bytes
from hdpo_train.config import HDPOConfig
from hdpo_train.model.attention import can_attend_by_documents
from hdpo_train.model.head import HeadTransform, PairBatch, attach_loss, bare, head_of, model_inputs
from hdpo_train.model.loading import backbone_of, disable_dropout
from hdpo_train.model.packing import Layout, lay_out, use_layout
from hdpo_train.model.router import router_coefficient
from hdpo_train.model.sequence_ranks import SequenceRanks, check_model
from hdpo_train.model.tiles import tile_sequences, tile_tokens
from hdpo_train.plan.ledger import HOST, Ledger, Segment

KINDS = ("weights", "gradients", "optimizer", "activations", "head", "other")
_NUMBERS = re.compile("idx|index|layer_id|layer_number")  # names of attributes in which layers that are alike differ


class MicroBatch(NamedTuple):
    """Pairs that go through the model together."""

    layout: Layout
    pairs: list[tuple[int, int, int]]  # tokens of prompt, chosen and rejected
    ranks: int = 1  # processes that share them (sp_size)


class _OneOf(SequenceRanks):
    """The last of so many ranks, which has the most completion tokens. The others are not there."""

    def __init__(self, size: int) -> None:
        self.group: Any = None
        self.rank, self.size = size - 1, size

    def _exchange(self, parts: Tensor) -> Tensor:
        return torch.empty_like(parts.contiguous())


class Memory(NamedTuple):
    """Bytes of one process at the peak of a step.

    device: by kind. activations: what forward leaves for backward. head: what the loss at the LM head makes, logits
        and the gradient of its weight. other: what passes, within backward and the optimizer's step.
    host: of activations that are offloaded, at most.
    moments: by kind, when most bytes are alive in each part of the step; the same parts in the same order for every
        micro-batch of as many pairs.
    """

    device: dict[str, int]
    host: int
    moments: list[dict[str, int]]

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.device.values())


def step_memory(model: nn.Module, args: HDPOConfig, batch: MicroBatch, tiles: bool = False, shards: int = 1) -> Memory:
    """What an optimizer step on micro-batches of this size takes of a process. The model stays as it is, unread.

    Args:
        model: a transformers or peft model on any device, "meta" too, with or without its loss attached.
        args: options of the run. Its device says what the head holds: a GPU's need not be there.
        batch: lengths do not matter to the time this takes, but where windows of attention go block by block.
        tiles: what can be is in tiles, whatever the options say.
        shards: processes that have a part each of weights, gradients and optimizer, as FSDP2 shares them out: layers
            are gathered when they run, one ahead, and what is in no layer for the whole of forward and backward. With
            1, ranks that share a row are those of DDP.

    Raises ValueError for a model that cannot run rows split over batch.ranks.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _GroupedProducts():
        fake: Any = _fake_copy(model)
        if not can_attend_by_documents(bare(fake).config.get_text_config()):
            bare(fake).set_attn_implementation("sdpa")  # other kernels do not run on fake tensors, and take as much
        ledger = Ledger()
        ledger.own(itertools.chain(fake.parameters(), fake.buffers()), "weights")
        _optimizer_step(fake, args, ledger)
        start = ledger.now.copy()
        prepare(fake, args, batch, ledger, tiles)
        everything = list(fake.modules())  # layers that are taken out stay alive, and so do their bytes in the ledger
        order = _keep_one_of_each_kind(fake, args, ledger)
        _count_routers(fake, order)
        kept = _count_the_head(fake, args, ledger)
        with ledger:
            micro_batch(fake, args, batch, "cpu", ledger)
        del everything
    gathered, buckets = _gathered(model, shards), 0
    if batch.ranks > 1 and shards == 1:  # then it is DDP, which has a copy of the gradients to exchange
        buckets = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    moments = [_sharded(ledger.segments["optimizer"].peak, shards)]
    moments[0]["gradients"] += buckets
    for name, moment in _replay(ledger.segments, order, start):
        moment = _sharded(moment, shards)
        moment["gradients"] += buckets
        moment["weights"] += gathered["weights"]
        moment["gradients"] += gathered["gradients"] if name == "embedding" or name[0] == "backward" else 0
        moments.append(moment)
    host = max(moment[HOST] for moment in moments)
    by_kind = [{kind: moment[kind] + max(kept) * (kind == "head") for kind in KINDS} for moment in moments]
    return Memory(max(by_kind, key=lambda moment: sum(moment.values())), host, by_kind)


class _GroupedProducts(TorchDispatchMode):
    """Run products of experts in bf16 on fake tensors, the only dtype for which torch knows the shape of the result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        a, b, *others = args
        return func(a.bfloat16(), b.bfloat16(), *others, **(kwargs or {})).to(a.dtype)


def _fake_copy(model: nn.Module) -> nn.Module:
    """Weights tied in the model are tied in the copy."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
    return copy.deepcopy(model, memo)


def _optimizer_step(model: nn.Module, args: HDPOConfig, ledger: Ledger) -> None:
    """Step the optimizer of the whole model as in a run's second step. Gradients stay if micro-batches add to them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.own([p.grad], "gradients"))
    optimizer = make_optimizer(model, args)
    optimizer.step()
    ledger.own((p.grad for p in trained), "gradients")
    states = (value for state in optimizer.state.values() for value in state.values())
    ledger.own((value for value in states if isinstance(value, Tensor)), "optimizer")
    with ledger:
        ledger.mark("optimizer")
        optimizer.step()
        ledger.close()
    if args.gradient_accumulation_steps == 1:
        optimizer.zero_grad()
    model._optimizer = optimizer  # type: ignore[assignment] # whose state stays alive as long as the model


def _keep_one_of_each_kind(model: nn.Module, args: HDPOConfig, ledger: Ledger) -> list[int]:
    """Take layers out of the model that are like others, and let the rest mark its segments.

    Returns for every layer of the model the number, among those kept, of the one that is like it; nothing if the model
    has no list of layers, and stays as it is.
    """
    backbone, config = backbone_of(bare(model)), bare(model).config.get_text_config()
    depth = config.num_hidden_layers
    lists = [m for m in backbone.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        return []
    (layers,) = lists
    by_layer = {k: v for k, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == depth}
    kinds: dict[Any, int] = {}
    kept: list[int] = []
    order: list[int] = []
    trained = False
    # the first layer's input may be the only one without a gradient, or the only one that is not offloaded
    alone = not backbone.get_input_embeddings().weight.requires_grad or _offloads(args)
    for number, layer in enumerate(layers):
        first = number == 0 and alone
        trained = trained or any(p.requires_grad for p in layer.parameters())
        kind = (first, trained, _kind(layer), repr([v[number] for v in by_layer.values()]))
        if kind not in kinds:
            kinds[kind] = len(kept)
            kept.append(number)
        order.append(kinds[kind])
    for name, values in by_layer.items():
        setattr(config, name, [values[number] for number in kept])
    config.num_hidden_layers = len(kept)
    layers._modules = {str(i): layers[number] for i, number in enumerate(kept)}
    for number, layer in enumerate(layers):
        _mark(layer, number, number == len(kept) - 1, ledger)
    return order


def _offloads(args: HDPOConfig) -> bool:
    kwargs: Any = args.gradient_checkpointing_kwargs or {}
    return bool(args.gradient_checkpointing and kwargs.get("offload"))


def _kind(layer: nn.Module) -> str:
    """A text that is the same for layers that are alike: classes, options and shapes of its modules."""
    parts = []
    for name, module in layer.named_modules():
        options = {
            k: v for k, v in vars(module).items() if type(v) in (bool, int, float, str) and not _NUMBERS.search(k)
        }
        tensors = [
            (k, tuple(v.shape), v.dtype, v.requires_grad)
            for k, v in itertools.chain(module._parameters.items(), module._buffers.items())
            if v is not None
        ]
        parts.append((name, type(module).__name__, options, tensors))
    return repr(parts)


def _mark(layer: nn.Module, number: int, last: bool, ledger: Ledger) -> None:
    """Let the layer begin segments: ("forward", number), ("backward", number), after the last one's forward "head",
    and "embedding" after the first one's backward."""
    kind: Any = type(layer)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ledger.mark(("forward", number))
        hidden = _first_tensor([*args, *kwargs.values()])
        if number == 0 and hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: ledger.mark("embedding"))
        output = kind.__call__(self, *args, **kwargs)
        hidden = _first_tensor(output if isinstance(output, tuple) else [output])
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: ledger.mark(("backward", number)))
        if last:
            ledger.mark("head")
        return output

    # of the class, since torch calls a module by its class's method, which is what checkpoints are in
    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _first_tensor(values: Any) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)


def _count_the_head(model: nn.Module, args: HDPOConfig, ledger: Ledger) -> list[int]:
    """Let the head's call hold what its operator makes out of sight; bytes that it keeps go into the result."""
    head: Any = head_of(bare(model))
    kept, call = [0], head.forward

    def forward(hidden: Tensor, pairs: PairBatch) -> Any:
        workspace = functools.partial(
            head_workspace_bytes,
            cu_seqlens=pairs.cu_seqlens,
            nll_weight=args.nll_weight,
            loss_type=args.pair_options.loss_type,
            f_divergence_type=args.f_divergence_type,
            gradient=args.gradient,
            chunk_bytes=args.chunk_bytes,
            device=args.device,
        )
        training, reference = workspace(hidden, head.weight), workspace(hidden.detach(), head.weight.detach())
        kept.extend((training.kept, reference.kept))
        with ledger.of_kind("head"):
            held = torch.empty(training.passing, dtype=torch.uint8)
            result = call(hidden, pairs)
        del held
        return result

    head.forward = forward
    return kept


def _count_routers(model: nn.Module, order: list[int]) -> None:
    """Let the router's loss be that of all layers of the model, since it is computed when the last one has run."""

    def repeat(backbone: nn.Module, inputs: Any, output: Any) -> None:
        if found := getattr(output, "router_logits", None):
            # of layers without experts too, in a model that has some: a few bytes too many
            output.router_logits = tuple(found[number % len(found)] for number in order)

    if order:
        backbone_of(bare(model)).register_forward_hook(repeat)


def _sharded(moment: Counter[str], shards: int) -> Counter[str]:
    return Counter(
        {
            kind: -(-size // shards) if kind in ("weights", "gradients", "optimizer") else size
            for kind, size in moment.items()
        }
    )


def _gathered(model: nn.Module, shards: int) -> Counter[str]:
    """Bytes of weights, and of their gradients, that are whole on a process for a time."""
    if shards == 1:
        return Counter()
    lists = [m for m in backbone_of(bare(model)).children() if isinstance(m, nn.ModuleList)]
    layers = [layer for each in lists for layer in each]
    sizes: dict[str, int] = {}
    for kind, counts in (("weights", lambda p: True), ("gradients", lambda p: p.requires_grad)):
        of_layers = [sum(p.nbytes for p in layer.parameters() if counts(p)) for layer in layers]
        everything = sum(p.nbytes for p in model.parameters() if counts(p))
        sizes[kind] = everything - sum(of_layers) + 2 * max(of_layers, default=0)
    return Counter(sizes)


def _replay(segments: dict[Any, Segment], order: list[int], start: Counter[str]) -> Iterator[tuple[Any, Counter[str]]]:
    """Parts of a micro-batch of the whole model, which begins with `start`, and the bytes at their peaks."""
    names: Iterator[Any] = itertools.chain(
        ["begin"],
        (("forward", number) for number in order),
        ["head"],
        (("backward", number) for number in reversed(order)),
        ["embedding"],
    )
    now = start
    for name in names:
        if name not in segments:
            continue
        segment = segments[name]
        at_peak, after = now.copy(), now.copy()
        for kind in {*segment.start, *segment.peak, *segment.end}:
            at_peak[kind] += segment.peak[kind] - segment.start[kind]
            after[kind] += segment.end[kind] - segment.start[kind]
        yield name, at_peak
        now = after


def prepare(model: Any, args: HDPOConfig, batch: MicroBatch, ledger: Ledger | None = None, tiles: bool = False) -> None:
    """Prepare the model as the trainer does. With a ledger, offloaded activations are only booked there."""
    if args.gradient_checkpointing:
        options: dict[str, Any] = dict(args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
        layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
        # its name from transformers 5.23 on
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options or None, every_n_layers=layers, offload=offload and ledger is None)
        if offload and ledger is not None:
            _offload_nowhere(model, ledger)
    if args.disable_dropout:
        disable_dropout(model)
    use_layout(bare(model), batch.layout)
    if batch.ranks > 1:
        longest = max(prompt + max(both) for prompt, *both in batch.pairs)
        check_model(bare(model), batch.layout, batch.ranks, longest)
    router = router_coefficient(bare(model), args, batch.ranks)
    if args.tiled_layers or (tiles and not router):  # left to itself, a run with a router's loss uses none
        tile_tokens(bare(model), refuse=not tiles)
        if batch.ranks == 1:
            tile_sequences(bare(model))
    # a softcap or scale costs nothing here, and finding it needs numbers
    attach_loss(bare(model), HeadTransform(None, 1.0))
    model.train()


def _offload_nowhere(model: nn.Module, ledger: Ledger) -> None:
    """Book what checkpointed layers save for recomputation, drop it, and make it anew when it is needed."""

    def forget(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        ledger.add(HOST, tensor.nbytes)
        return tensor.shape, tensor.dtype

    def make(saved: tuple[torch.Size, torch.dtype]) -> Tensor:
        tensor = torch.empty(saved[0], dtype=saved[1])
        ledger.add(HOST, -tensor.nbytes)
        return tensor

    def checkpoint(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with saved_tensors_hooks(forget, make):
            return function(*inputs, **options)

    for module in model.modules():
        if isinstance(function := getattr(module, "_gradient_checkpointing_func", None), functools.partial):
            module._gradient_checkpointing_func = functools.partial(checkpoint, function)  # type: ignore[assignment]


def make_optimizer(model: nn.Module, args: HDPOConfig) -> torch.optim.Optimizer:
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    return kind([p for p in model.parameters() if p.requires_grad], **options)


def micro_batch(
    model: nn.Module, args: HDPOConfig, batch: MicroBatch, device: str, ledger: Ledger | None = None
) -> None:
    """Forward and backward."""
    vocab = head_of(bare(model)).weight.shape[0]
    ids = [tuple([token % vocab for token in range(size)] for size in pair) for pair in batch.pairs]
    ranks = _OneOf(batch.ranks) if batch.ranks > 1 else None
    # which labels are this rank's is told by numbers, which fake tensors do not have
    with contextlib.nullcontext() if ranks is None else unset_fake_temporarily():
        inputs = lay_out(ids, batch.layout, 0)  # type: ignore[arg-type]
        inputs["ref_logps"] = torch.zeros(2 * len(ids))
        router = router_coefficient(bare(model), args, batch.ranks)
        inputs = model_inputs(inputs, torch.device(device), args.step_loss().keywords, ranks, router)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if ledger is not None:
        ledger.kind = "activations"
        ledger.mark("begin")
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        loss = model(**inputs).loss
        loss = loss / args.gradient_accumulation_steps
    if ledger is not None:
        ledger.kind = "other"
    loss.backward()
    if ledger is not None:
        ledger.close()
