"""MLPs on a tile of tokens at a time: of what a layer holds, most is the MLP's inside.

Exact but for the order of sums: a token's MLP knows no other token. In backward a tile is computed again, so that one
tile's inside is all that is ever alive.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hdpo_train.head import head_of
from hdpo_train.models import backbone_of, evaluating

TILE = 4096  # tokens: enough for a GEMM to run at full speed


def tile_mlps(model: PreTrainedModel) -> None:
    """Let every layer's `mlp` run on tiles of tokens; `model` is the bare transformers model.

    Raises ValueError, naming the model, where no layer has an `mlp`, or one gives something else than a vector a token.
    """
    mlps = [module for name, module in backbone_of(model).named_modules() if name.rpartition(".")[2] == "mlp"]
    outputs: list[Any] = []
    hooks = [mlp.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for mlp in mlps]
    with torch.no_grad(), evaluating(model):
        backbone_of(model)(input_ids=torch.arange(2, device=head_of(model).weight.device)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    if not mlps or not all(isinstance(output, Tensor) and output.dim() == 3 for output in outputs):
        reason = "give more than a vector for each token" if mlps else "are not called mlp"
        raise ValueError(f"tiled_mlp cannot be used: the MLPs of {type(model).__name__} {reason}; leave it out")
    for mlp in mlps:
        mlp.forward = types.MethodType(_TiledMLP.forward, mlp)  # type: ignore[method-assign]


# Bound to a module as its forward; it knows the module as `self` alone, so that a copy runs with its own weights.
class _TiledMLP(nn.Module):
    def forward(self, hidden: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        own = type(self).forward
        length = hidden.shape[1] if hidden.dim() == 3 else 0
        if length <= TILE:
            return own(self, hidden, *others, **kwargs)

        def along_tokens(value: Any) -> bool:
            return isinstance(value, Tensor) and value.shape[:2] == hidden.shape[:2]

        outputs = []
        for start in range(0, length, TILE):
            tile = [value[:, start : start + TILE] if along_tokens(value) else value for value in (hidden, *others)]
            if torch.is_grad_enabled():
                outputs.append(checkpoint(own, self, *tile, use_reentrant=False, **kwargs))
            else:
                outputs.append(own(self, *tile, **kwargs))
        return torch.cat(outputs, 1)
