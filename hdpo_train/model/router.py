"""The router's loss of mixtures of experts, by which tokens are spread over the experts, as transformers computes it.

With f_e the mean number of tokens of which expert e is one of the k chosen, and P_e the mean probability that the
router gives to it, both over all tokens and layers, it is E Σ_e f_e P_e (arXiv 2101.03961, equations 4 to 6).

A token counts once for each sequence that it is part of: one of a shared prompt twice, and padding not at all. That
makes it the same number in every layout, and that of TRL, where every sequence is a row with an attention mask.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hdpo_train.model.loading import backbone_of, evaluating

_WITHOUT = "train without this loss by router_aux_loss_coef=0"
_OF_TRANSFORMERS = ("every_n_layers", "offload")  # of gradient_checkpointing_kwargs; the others go to torch


def router_loss(model: PreTrainedModel, router_logits: tuple[Tensor, ...], counts: Tensor) -> Tensor:
    """The loss of a forward; it has a gradient.

    router_logits: of each layer with experts, (B · R, E). counts: (B, R), of how many sequences a token is part.
    """
    logits = tuple(each.flatten(0, -2) for each in router_logits)
    return _function(model)(logits, logits[0].shape[-1], _experts_per_token(model), counts)  # type: ignore[misc]


def router_coefficient(model: PreTrainedModel, args: Any, ranks: int = 1) -> float:
    """What the router's loss is multiplied by in the loss of a run; 0: it is not computed.

    Args:
        model: the policy.
        args: an HDPOConfig. Its router_aux_loss_coef may be None: the model's own, if the model has such a loss.
        ranks: processes that share every sequence.

    Raises ValueError for a coefficient that cannot be had.
    """
    name, config, wanted = type(model).__name__, model.config.get_text_config(), args.router_aux_loss_coef
    has = hasattr(config, "output_router_logits") and _function(model) is not None and bool(_experts_per_token(model))
    if wanted and not has:
        raise ValueError(
            f"router_aux_loss_coef={wanted} is given, and transformers has no router loss of {name}: leave it out"
        )
    coefficient = wanted if wanted is not None else getattr(config, "router_aux_loss_coef", 0.0) if has else 0.0
    if not coefficient:
        return 0.0
    of_torch = {k: v for k, v in (args.gradient_checkpointing_kwargs or {}).items() if k not in _OF_TRANSFORMERS}
    reason = ""
    if ranks > 1:
        reason = f"it is not linear in tokens, and with sp_size={ranks} a process has a part of them"
    elif args.tiled_layers:
        reason = "with tiled_layers a router sees tokens in parts, and those of some prompts twice"
    elif args.gradient_checkpointing and of_torch and of_torch.get("use_reentrant", True):
        reason = f"checkpoints of gradient_checkpointing_kwargs={of_torch} (use_reentrant=True) give it no gradient"
    if reason:
        raise ValueError(
            f"the router loss of {name} (router_aux_loss_coef={coefficient:g}) cannot be added, since {reason}: leave "
            f"that out, or {_WITHOUT}"
        )
    return float(coefficient)


@torch.no_grad()
def check_router_loss(model: PreTrainedModel) -> None:
    """Raises ValueError unless the loss of two tokens is the one that the model's own forward gives."""
    ids = torch.arange(2, device=model.get_output_embeddings().weight.device)[None]
    inputs = {"input_ids": ids, "use_cache": False, "output_router_logits": True}
    with evaluating(model):
        try:
            theirs = model(**inputs).aux_loss.float()
            own = router_loss(model, backbone_of(model)(**inputs).router_logits, torch.ones_like(ids)).float()
            reason = "" if torch.allclose(own, theirs, rtol=1e-2) else f"it is {theirs:g}, and {own:g} here"
        except Exception as error:  # of a family that does it in its own way
            reason = f"{type(error).__name__}: {error}"
    if reason:
        raise ValueError(f"the router loss of {type(model).__name__} cannot be computed here ({reason}): {_WITHOUT}")


def _function(model: PreTrainedModel) -> Callable[..., Any] | None:
    """That of the model's family."""
    modules = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    return next((f for f in (getattr(m, "load_balancing_loss_func", None) for m in modules) if f is not None), None)


def _experts_per_token(model: PreTrainedModel) -> int | None:
    owners = (model, model.config.get_text_config())
    return next((k for k in (getattr(owner, "num_experts_per_tok", None) for owner in owners) if k), None)
