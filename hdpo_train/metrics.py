"""What is logged of the loss: sums over pairs that stay on the device, divided once per log line."""

import math
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hdpo_kernels import HDPOLoss
from hdpo_kernels.device import to_device
from hdpo_kernels.pair import PairOptions, initial_margins

_SUMS = (
    "pairs", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "rewards/initial_margins", "logps/chosen", "logps/rejected",
    "tokens/chosen", "tokens/rejected", "entropy/chosen", "entropy/rejected", "mean_token_accuracy", "num_tokens",
    "aux_loss", "logits/chosen", "logits/rejected",
)  # fmt: skip


METRICS = (*_SUMS[1:9], "entropy", *_SUMS[11:14], *_SUMS[16:])  # of an evaluation


def batch_sums(
    result: HDPOLoss,
    inputs: dict[str, Any],
    options: PairOptions,
    aux_loss: Tensor | None = None,
    logits: Tensor | None = None,
) -> Tensor:
    """One vector on the loss's device, one entry for each of _SUMS. inputs: a batch of `PairCollator`.

    aux_loss (), logits (S,): see `PairBatch`.
    """
    assert result.entropy is not None and result.accuracy is not None
    device, ref_logps = result.logps.device, inputs["ref_logps"].to(result.logps.device)
    numbers = [*(end - start for start, end in pairwise(inputs["cu_seqlens"])), inputs["num_tokens"]]
    (counts,) = to_device([torch.tensor(numbers, device="cpu")], device)
    lengths, num_tokens = counts[:-1].float(), counts[-1]
    nats = result.entropy * lengths
    logits = torch.full_like(lengths, torch.nan) if logits is None else logits
    per_pair = (
        torch.ones_like(result.margins), result.loss.detach().expand_as(result.margins),
        result.chosen_rewards, result.rejected_rewards, (result.margins > 0).float(), result.margins,
        initial_margins(ref_logps, lengths, options), result.logps[0::2], result.logps[1::2],
        lengths[0::2], lengths[1::2], nats[0::2], nats[1::2], (result.accuracy * lengths)[0::2], num_tokens,
        torch.zeros_like(result.margins) if aux_loss is None else aux_loss.expand_as(result.margins),
        logits[0::2], logits[1::2],
    )  # fmt: skip
    return torch.stack([values.float().sum() for values in per_pair])


def means(sums: list[Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Means over all pairs (entropies, logits, accuracy: over tokens of completions) of the batches of all processes.

    num_tokens is a sum, of prompts and completions.
    """
    total = dict(zip(_SUMS, accelerator.reduce(torch.stack(sums).sum(0), "sum").tolist(), strict=True))
    pairs, chosen, rejected = (total.pop(key) for key in ("pairs", "tokens/chosen", "tokens/rejected"))
    entropy = {key: total.pop(key) for key in ("entropy/chosen", "entropy/rejected")}
    right, num_tokens = total.pop("mean_token_accuracy"), total.pop("num_tokens")
    if not total["aux_loss"]:  # a router's loss is never 0
        del total["aux_loss"]
    logits = {key: total.pop(key) / n for key, n in (("logits/chosen", chosen), ("logits/rejected", rejected))}
    return {
        **{key: value / pairs for key, value in total.items()},
        "entropy": sum(entropy.values()) / (chosen + rejected),
        "entropy/chosen": entropy["entropy/chosen"] / chosen,
        "entropy/rejected": entropy["entropy/rejected"] / rejected,
        "mean_token_accuracy": right / chosen,
        **{key: value for key, value in logits.items() if not math.isnan(value)},  # NaN: nobody has computed them
        "num_tokens": num_tokens,
    }


def finite(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether every trainable weight is finite, on every process. Reads each of them once; costs a device sync."""
    weights = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    own = [w.to_local() if isinstance(w, DTensor) else w for w in weights]  # the part of a sharded one that is here
    own = [w for w in own if w.numel()]
    largest = torch.nn.utils.get_total_norm(own, math.inf) if own else torch.zeros(())
    broken = (~largest.isfinite()).float().to(accelerator.device)
    return not accelerator.reduce(broken, "sum").item()
