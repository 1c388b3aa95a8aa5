"""Options of TRL's DPOConfig that HDPOConfig does not have: what is so already, and what to do instead."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.utils import logging

from hdpo_train import markdown

logger = logging.get_logger(__name__)


class Instead(NamedTuple):
    """What stands in an option's place. means_nothing: values that ask for nothing, or for what is so here."""

    means_nothing: tuple[Any, ...]
    text: str


_NO_MODEL = "the reference is no model here, but cached log-probs: start another run from this run's model"
INSTEAD = {
    "precompute_ref_log_probs": Instead((True,), "reference log-probs are always computed once and cached"),
    "padding_free": Instead((True,), "rows are packed where the model allows it; packing=False pads them"),
    "truncation_mode": Instead(
        ("keep_start",), "the end of a sequence is cut; max_prompt_length cuts a prompt's start"
    ),
    "pad_to_multiple_of": Instead((None, "auto"), "packed rows are not padded: leave it out"),
    "pad_token": Instead((None,), "set tokenizer.pad_token, and give the tokenizer as processing_class"),
    "trust_remote_code": Instead(
        (False,), "give model_init_kwargs={'trust_remote_code': True}; hdpo-train has the option"
    ),
    "activation_offloading": Instead(
        (False,), "set gradient_checkpointing and gradient_checkpointing_kwargs={'offload': True}"
    ),
    "sync_ref_model": Instead((False,), _NO_MODEL),
    "ref_model_mixup_alpha": Instead((), _NO_MODEL),
    "ref_model_sync_steps": Instead((), _NO_MODEL),
    "ld_alpha": Instead(
        (None, 1.0), "it needs reference log-probs of parts of a sequence; alpha_level='token' weighs lengths"
    ),
    "use_weighting": Instead((False,), "it needs another statistic of every row: leave it out"),
}


def taking_options_of_trl(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a config, which names what stands in the place of an option of TRL's that it lacks.

    Such an option is taken where it asks for nothing. False, where True is what is done here, is a warning: the numbers
    are the same. Other values are a ValueError.
    """

    @functools.wraps(init)
    def with_options_of_trl(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in [name for name in kwargs if name in INSTEAD]:
            value, (means_nothing, text) = kwargs.pop(name), INSTEAD[name]
            if value in means_nothing:
                continue
            if value is not False:
                raise ValueError(f"{name}={value!r} of TRL's DPOConfig has no place here: {text}")
            logger.warning(f"{name}=False changes nothing: {text}")
        init(self, *args, **kwargs)

    return with_options_of_trl


def table() -> str:
    """In Markdown, for the documentation."""
    return markdown.table(["option of TRL's DPOConfig", "here"], [[f"`{name}`", i.text] for name, i in INSTEAD.items()])
