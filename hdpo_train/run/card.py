"""The model card of a run: README.md beside the model, in the hub's format."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hdpo_train.files import write_whole
from hdpo_train.markdown import table

CARD_FILE = "README.md"
_OURS = "<!-- Written by hdpo-train. Without this line the file is yours, and is not written again. -->"
_PLACEHOLDER = "# Model Card for Model ID"  # what peft leaves
_ROWS = {  # of metrics.jsonl
    "loss": "loss",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "entropy/chosen": "entropy on chosen, nats per token",
    "entropy/rejected": "entropy on rejected, nats per token",
    "entropy/policy": "entropy of the policy's own answers, nats per token",
}


def model_card(
    name: str, base_model: str, start: Mapping[str, Any], history: Sequence[Mapping[str, Any]], **metadata: Any
) -> str:
    """The text of a card.

    Args:
        name: of the model.
        base_model: folder or hub id that training started from.
        start: the first line of metrics.jsonl.
        history: its other lines.
        metadata: of huggingface_hub's ModelCardData, such as `datasets`, names of the data.
    """
    names = metadata.pop("datasets", None) or []
    data = ModelCardData(
        base_model=base_model if _is_hub_id(base_model) else None,
        datasets=[each for each in names if _is_hub_id(each)] or None,
        pipeline_tag="text-generation",
        tags=sorted({"dpo", "h-dpo", *(metadata.pop("tags", None) or [])}),
        **metadata,
    )
    final = f", changed to {last:g} by the end" if (last := _last_alpha(history)) not in (None, start["alpha"]) else ""
    level = " (by token)" if start.get("alpha_level") == "token" else ""
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        _OURS,
        f"# {name}",
        f"{base_model or 'A model'}, trained on {start['pairs']} preference pairs{' of ' if names else ''}"
        f"{', '.join(names)} with H-DPO ([arXiv 2411.07595](https://arxiv.org/abs/2411.07595)): α = "
        f"{start['alpha']:g}{level}{final}, β = {start['beta']:g}, loss {start['loss_type']}. α < 1 sharpens the "
        "policy, α = 1 is DPO, α > 1 diversifies it.",
        *_progress(history),
        f"Versions: {', '.join(_versions(('hdpo', 'torch', 'transformers', 'peft')))}. `metrics.jsonl` has every line "
        "that was logged, `report.png` their plots, `run.json` the options.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def write_card(folder: Path, text: str) -> bool:
    """Whether the card was written: one that somebody has written or changed stays."""
    path = folder / CARD_FILE
    if path.exists():
        found = path.read_text(encoding="utf-8", errors="replace")
        if _OURS not in found and _PLACEHOLDER not in found:
            return False
    ModelCard(text)  # raises where the hub would refuse it
    write_whole(path, text)
    return True


def _progress(history: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [line for line in history if "loss" in line]
    if not lines:
        return []
    first, last = lines[0], lines[-1]
    rows = [
        [title, f"{first[key]:.4g}", f"{last[key]:.4g}"] for key, title in _ROWS.items() if key in first and key in last
    ]
    return [table(["on the training pairs", f"up to step {first['step']}", f"up to step {last['step']}"], rows)]


def _last_alpha(history: Sequence[Mapping[str, Any]]) -> float | None:
    return next((line["alpha"] for line in reversed(history) if "alpha" in line), None)


def _is_hub_id(name: str) -> bool:
    return bool(name) and not Path(name).exists() and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _versions(packages: Sequence[str]) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
