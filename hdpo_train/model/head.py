"""The only file that knows the inside of a transformers model: backbone → hidden states, LM head, softcap, scale.

The loss is computed inside the root model's forward, and there inside the LM head module's call, so that whatever
hooks on these calls (DDP's reducer, FSDP's and ZeRO-3's gathering of sharded weights, accelerate's autocast) sees it.
"""

import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hdpo_kernels import linear_hdpo_loss, sequence_sum
from hdpo_train.model.loading import backbone_of, evaluating
from hdpo_train.model.packing import Places, backbone_inputs
from hdpo_train.model.router import router_loss
from hdpo_train.model.sequence_ranks import SequenceRanks

_BLOCK = 2**20  # numbers that the mean logits take in fp32 at a time


class UnsupportedHead(ValueError):
    """The model's head is not softcap(scale · (h Wᵀ + b))."""


class HeadTransform(NamedTuple):
    """logits = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap)"""

    softcap: float | None
    logit_scale: float

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class PairBatch:
    """What the loss needs beside the backbone's inputs; see `data.PairCollator`.

    No tuple and no dataclass: FSDP would find ref_logps in it, and round them to the parameters' dtype.
    """

    def __init__(
        self,
        rows: Tensor,
        labels: Tensor,
        cu_seqlens: list[int],
        ref_logps: Tensor | None,
        loss_kwargs: Mapping[str, Any],
        counts: Tensor,
        router: float,
    ) -> None:
        self.rows = rows  # (N,) positions in the flattened (B · R) whose hidden state predicts a completion token
        self.labels = labels  # (N,) those tokens
        self.cu_seqlens = cu_seqlens  # 2P + 1 boundaries in N
        self.ref_logps = ref_logps  # (2P,)
        self.loss_kwargs = loss_kwargs  # keywords of linear_hdpo_loss
        self.counts = counts  # (B, R) of how many sequences a token is part
        self.router = router  # the factor of the router's loss, which is added to the other one
        self.aux_loss: Tensor | None = None  # the router's loss, put here by the model's forward if the factor is not 0
        self.logits: Tensor | None = None  # (2P,) sums of `mean_logits`, put here by the head's unless softcapped


def attach_loss(model: PreTrainedModel, transform: HeadTransform | None = None) -> None:
    """Teach `model(input_ids=…, places=…, pairs=…)` to return an HDPOLoss; without pairs as before.

    Nothing of a run is kept in the model: it may be copied, and several trainers may share it.

    model: the bare transformers model (inside any peft wrapper), before it is wrapped for distributed training.
    transform: what comes after the head, if it need not be found out.
    Raises UnsupportedHead, with the model's name and the reason, if its head cannot be represented.
    """
    head: Any = head_of(model)
    head.transform = transform or find_transform(model)
    head.forward = types.MethodType(_HeadWithLoss.forward, head)
    model.forward = types.MethodType(_ModelWithLoss.forward, model)


# Both are bound to a module as its forward. They know it as `self` alone, so that a copy of the module runs with its
# own weights; and they have that name because pickle stores a bound method by its name.


class _ModelWithLoss(PreTrainedModel):
    def forward(self, *args: Any, pairs: PairBatch | None = None, places: Places | None = None, **kwargs: Any) -> Any:
        if pairs is None:
            return type(self).forward(self, *args, **kwargs)
        inputs = {} if places is None else backbone_inputs(self, places)
        if hasattr(self.config.get_text_config(), "output_router_logits"):
            inputs["output_router_logits"] = bool(pairs.router)
        output = backbone_of(self)(input_ids=kwargs["input_ids"], **inputs, use_cache=False)
        hidden = output.last_hidden_state
        scored = hidden.flatten(0, 1).index_select(0, pairs.rows.to(hidden.device))  # (B, R, H) -> (N, H)
        result = head_of(self)(scored, pairs)
        if not pairs.router:
            return result
        aux_loss = router_loss(self, output.router_logits, pairs.counts).to(result.loss.device)
        pairs.aux_loss = aux_loss.detach()
        return result._replace(loss=result.loss + pairs.router * aux_loss)


class _HeadWithLoss(nn.Linear):
    transform: HeadTransform

    @torch.compiler.disable  # alpha may change with every step, and a float is a constant of a compiled graph
    def forward(self, hidden: Tensor, pairs: PairBatch | None = None) -> Any:  # type: ignore[override]
        if pairs is None:
            return type(self).forward(self, hidden)
        if hidden.dtype != self.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.weight.dtype)  # a norm in fp32 above a bf16 head
        if self.transform.softcap is None and pairs.ref_logps is not None:  # the reference's logits are not logged
            means = mean_logits(hidden, self.weight, self.bias, self.transform.logit_scale)
            pairs.logits = sequence_sum(means, pairs.cu_seqlens)
        return linear_hdpo_loss(
            hidden,
            self.weight,
            pairs.labels,
            pairs.cu_seqlens,
            pairs.ref_logps,
            bias=self.bias,
            softcap=self.transform.softcap,
            logit_scale=self.transform.logit_scale,
            **pairs.loss_kwargs,
        )


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    """Mean over the vocabulary of the logits logit_scale · (h Wᵀ + b) of each row, by one read of the weight.

    It is the logit of the mean weight; after a softcap it would not be. hidden (N, H), weight (V, H), bias (V,) ->
    (N,) fp32.
    """
    rows = max(_BLOCK // weight.shape[1], 1)
    # a CPU sums bf16 in fp32 by a copy of all of it in fp32
    parts = weight.split(rows) if weight.device.type == "cpu" else (weight,)
    mean = torch.stack([part.sum(0, dtype=torch.float32) for part in parts]).sum(0) / len(weight)
    logits = torch.cat([(part.float() * mean).sum(1) for part in hidden.split(rows)])
    return logit_scale * (logits if bias is None else logits + bias.mean(dtype=torch.float32))


def bare(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"the model must be a transformers PreTrainedModel, got {type(inner).__name__}")
    return inner


def head_of(model: PreTrainedModel) -> nn.Linear:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedHead(f"{name} is an encoder-decoder; a decoder-only causal language model is needed")
    if (ranks := getattr(model, "tp_size", None) or 1) > 1:
        raise UnsupportedHead(
            f"{name} is tensor-parallel over {ranks} ranks (tp_plan), and the trainer's head is whole: load it without "
            "a plan, shard it by FSDP2 or ZeRO-3, and split long sequences by sp_size"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or len(whole_shape(head.weight)) != 2 or not head.weight.is_floating_point():
        raise UnsupportedHead(
            f"the LM head of {name} is a {type(head).__name__}, not a plain nn.Linear; "
            "leave the head out of LoRA's target_modules and modules_to_save, and unquantized"
        )
    return head


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight before ZeRO-3 cut it into shards."""
    return getattr(weight, "ds_shape", weight.shape)


def find_transform(model: PreTrainedModel) -> HeadTransform:
    """Softcap and logit scale by the model's config, checked against what its forward does to the head's output.

    The head's output is replaced by a ramp from -60 to 60 on its way out, so that a softcap or a scale is seen in full
    whatever the model's weights are.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    seen: dict[str, Tensor] = {}

    def ramp(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        seen["hidden"] = args[0].detach()
        seen["ramp"] = torch.linspace(-60, 60, output.numel(), device=output.device).view_as(output).to(output.dtype)
        return seen["ramp"]

    ids = torch.arange(2, device=head_of(model).weight.device).unsqueeze(0)
    hook = head_of(model).register_forward_hook(ramp)
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits.float()
            hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    if (
        "hidden" not in seen
        or seen["hidden"].shape != hidden.shape
        or not torch.allclose(seen["hidden"], hidden, equal_nan=True)
    ):
        raise UnsupportedHead(f"{name} changes its hidden states between backbone and head; it cannot be fused")
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-4}.get(seen["ramp"].dtype, 2e-2)
    softcap = getattr(config, "final_logit_softcapping", None)
    for scale in _scales(config):
        transform = HeadTransform(softcap, scale)
        expected = transform(seen["ramp"].float())
        if (logits - expected).abs().max() <= tolerance * expected.abs().max():
            return transform
    raise UnsupportedHead(
        f"{name} does something to its logits that its config's final_logit_softcapping={softcap} and scale "
        f"{' or '.join(f'{s:g}' for s in _scales(config))} do not explain; its head cannot be fused"
    )


def _scales(config: Any) -> list[float]:
    """Candidates for the factor on the logits. Families disagree on the name, and on multiplying or dividing."""
    named = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier", "output_multiplier")]
    scales = [float(value) for value in named if isinstance(value, (int, float))]
    divisor = getattr(config, "logits_scaling", None)
    if divisor:
        scales += [1 / float(divisor), float(divisor)]
    return scales or [1.0]


def model_inputs(
    batch: Mapping,
    device: torch.device,
    loss_kwargs: Mapping[str, Any],
    ranks: SequenceRanks | None = None,
    router: float = 0.0,
) -> dict:
    """Keywords of the model's forward for a batch of `PairCollator`; with ranks, for this process's part of it.

    Labels stay on the host, where the loss checks them before it takes them to the device itself.

    loss_kwargs: those of `linear_hdpo_loss`. router: see `router.router_coefficient`.
    """
    if ranks is not None:
        batch, loss_kwargs = ranks.own_tokens(dict(batch)), {**loss_kwargs, "sp_group": ranks.group}
    on_device: dict[str, Any] = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }
    labels = batch["labels"].tensor
    pairs = PairBatch(
        on_device["rows"],
        labels,
        batch["cu_seqlens"],
        on_device.get("ref_logps"),
        loss_kwargs,
        on_device["counts"],
        router,
    )
    inputs = {"input_ids": on_device["input_ids"], "pairs": pairs}
    if "documents" in batch:
        inputs["places"] = Places(on_device["position_ids"], batch["documents"], ranks)
    return inputs
