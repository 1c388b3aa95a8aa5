"""H-DPO training on transformers: HDPOConfig, HDPOTrainer and the command hdpo-train."""

from hdpo_train.config import HDPOConfig
from hdpo_train.trainer import HDPOTrainer

__all__ = ["HDPOConfig", "HDPOTrainer"]
