"""Fused kernels for the H-DPO loss at the LM head. Start reading at `naive` (the specification), then `loss`."""

from hdpo_kernels import naive
from hdpo_kernels.logits_loss import hdpo_loss
from hdpo_kernels.logp import linear_logp
from hdpo_kernels.loss import linear_hdpo_loss
from hdpo_kernels.naive import HDPOLoss, TokenLogp
from hdpo_kernels.pair import pair_loss
from hdpo_kernels.sequence import sequence_sum

__all__ = [
    "HDPOLoss",
    "TokenLogp",
    "hdpo_loss",
    "linear_hdpo_loss",
    "linear_logp",
    "naive",
    "pair_loss",
    "sequence_sum",
]
