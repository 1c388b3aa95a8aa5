"""H-DPO training on transformers: HDPOConfig, HDPOTrainer and the command hdpo-train."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdpo_train.config import HDPOConfig
    from hdpo_train.trainer import HDPOTrainer

__all__ = ["HDPOConfig", "HDPOTrainer"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: torch and transformers take seconds, which no help text should."""
    if name == "HDPOConfig":
        from hdpo_train.config import HDPOConfig

        return HDPOConfig
    if name == "HDPOTrainer":
        from hdpo_train.trainer import HDPOTrainer

        return HDPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
