"""Reference log-probs that the records bring along, in columns of the user's own."""

import math
from numbers import Real

from datasets import Dataset

COLUMNS = ("ref_chosen_logp", "ref_rejected_logp")
OF_TRL = ("ref_chosen_logps", "ref_rejected_logps")
_BAD = f"one of {' and '.join(COLUMNS)} is missing or not a finite number of at most 0"
_ROUNDING = 1e-3  # nats: a completion that the reference is certain of


def own_reference(dataset: Dataset, where: str) -> tuple[dict[str, list[float]], list[str | None]]:
    """COLUMNS -> values, nats, NaN for those that are none, and for each record what is wrong; empty without them.

    Raises ValueError for one column without the other, and for columns under both names.
    """
    names = [name for name in (*COLUMNS, *OF_TRL) if name in dataset.column_names]
    if not names:
        return {}, [None] * len(dataset)
    if tuple(names) not in (COLUMNS, OF_TRL):
        raise ValueError(
            f"the {where} has reference log-probs in {', '.join(names)}: needed are {' and '.join(COLUMNS)} (or TRL's "
            f"{' and '.join(OF_TRL)}), or none of them"
        )
    columns = [[_number(value) for value in dataset.with_format(None)[name][:]] for name in names]
    bad = [None if all(map(math.isfinite, values)) else _BAD for values in zip(*columns, strict=True)]
    return dict(zip(COLUMNS, columns, strict=True)), bad


def _number(value: object) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    return number if -math.inf < number <= _ROUNDING else math.nan
