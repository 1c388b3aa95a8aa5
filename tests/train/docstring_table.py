"""The table in a function's docstring: what is documented is what is tested."""

from collections.abc import Callable


def rows(function: Callable) -> list[tuple[str, str]]:
    """(text, what is read) of every line "text → what is read"; ⏎ stands for a line break, · for an indentation."""
    found = [line.strip().rpartition(" → ") for line in (function.__doc__ or "").splitlines() if " → " in line]
    return [
        (text.strip().replace(" ⏎ ", "\n").replace("⏎ ", "\n").replace("·", "    "), read) for text, _, read in found
    ]
