"""Whether the steps of a run fit into the memory of its device, and are to be in tiles if they do not.

A bound that is far too high, made of a few products, is enough for most runs. Where it does not fit, `step_memory`
takes seconds to say what a step takes.
"""

import os

import psutil
import torch
from torch import nn
from transformers.utils import logging

from hdpo_kernels.workspace import head_workspace_bytes
from hdpo_train.config import HDPOConfig
from hdpo_train.files import readable
from hdpo_train.model.head import bare, head_of
from hdpo_train.model.packing import Layout
from hdpo_train.plan.memory import MicroBatch, step_memory

logger = logging.get_logger(__name__)
_CONSTANT = 2**30  # bytes of what does not grow with a run, as the scores that eager attention holds
_FULL = 0.9  # of the memory that is there, as an allocator cannot use all of it


def wants_tiles(
    model: nn.Module,
    args: HDPOConfig,
    layout: Layout,
    lengths: list[tuple[int, int, int]],
    shards: int = 1,
    ranks: int = 1,
) -> bool:
    """Whether a step would not fit without tiles, and takes less with them; it says so. Never raises.

    Args:
        model: the policy, whole, on any device.
        lengths: of all pairs, tokens of prompt, chosen and rejected.
        shards: processes that share weights, gradients and optimizer.
        ranks: processes that share every row.
    """
    batch = largest(lengths, args, layout)._replace(ranks=ranks)
    try:
        there = room(model, args)
        if there is None or bound(model, args, batch) < there:
            return False
        needed, less = (step_memory(model, args, batch, tiles, shards).total for tiles in (False, True))
    except Exception as error:  # an estimate that cannot be made is no reason not to train
        logger.warning(f"tiled_layers: off; whether a step fits cannot be told ({type(error).__name__}: {error})")
        return False
    if needed < _FULL * there or less >= needed:
        return False
    logger.warning(
        f"tiled_layers: on, as a step on the longest pairs ({', '.join(map(str, batch.pairs[:3]))}"
        f"{' …' * (len(batch.pairs) > 3)} tokens of prompt, chosen and rejected) would take {readable(needed)} of "
        f"{readable(there)}; so {readable(less)}"
    )
    return True


def largest(lengths: list[tuple[int, int, int]], args: HDPOConfig, layout: Layout) -> MicroBatch:
    """The micro-batch of the longest pairs that may come together."""
    longest = sorted(lengths, key=lambda pair: layout.tokens(*pair), reverse=True)[: args.train_batch_size]
    budget, pairs = args.max_tokens_per_batch, longest[:1]
    for pair in longest[1:]:
        if budget is None or sum(layout.tokens(*each) for each in (*pairs, pair)) <= budget:
            pairs.append(pair)
    return MicroBatch(layout, pairs)


def room(model: nn.Module, args: HDPOConfig) -> int | None:
    """Bytes that this process may use, with those the model has already; None if the device does not tell."""
    device = args.device
    own = sum(p.nbytes for p in model.parameters() if p.device.type == device.type)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + max(torch.cuda.memory_reserved(device), own)
    if device.type == "cpu":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + own
    return None


def bound(model: nn.Module, args: HDPOConfig, batch: MicroBatch) -> float:
    """An upper bound of the bytes that a step takes."""
    config, head = bare(model).config.get_text_config(), head_of(bare(model)).weight
    width, depth = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    inner *= (getattr(config, "num_experts_per_tok", None) or 0) + 1
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or 0)
    tokens = sum(batch.layout.tokens(*pair) for pair in batch.pairs)
    inside = 40 * width + 10 * heads + 8 * inner  # numbers of a token in a layer, forward and backward
    if not batch.layout.packed:
        length = max(prompt + max(both) for prompt, *both in batch.pairs)
        tokens = 2 * len(batch.pairs) * length
        inside += 8 * config.num_attention_heads * length  # scores, and masks
    layers = depth * width + inside if args.gradient_checkpointing else depth * inside
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    hidden = torch.empty(1, 1, dtype=head.dtype, device="cpu", requires_grad=True).expand(tokens, head.shape[1])
    scored = [0, *(tokens // 2 * i for i in (1, 2))]
    at_head = head_workspace_bytes(hidden, head, scored, chunk_bytes=args.chunk_bytes, device=args.device)
    return weights + 6 * trained + 4 * tokens * layers + 2 * sum(at_head) + _CONSTANT
