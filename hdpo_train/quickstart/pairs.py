"""Preference pairs from the model's own answers: a right one is preferred to a wrong one."""

import random
from collections.abc import Callable

from hdpo_train.quickstart import task


def judge(
    prompts: list[str],
    answers: list[list[str]],
    per_prompt: int,
    seed: int,
    is_right: Callable[[str, str], bool] = task.is_right,
) -> list[dict[str, str]]:
    """At most per_prompt records a prompt, no answer used twice; a prompt with right answers only gives none.

    answers: of each prompt. is_right: (prompt, answer) -> bool.
    """
    rng = random.Random(seed)
    records = []
    for prompt, drawn in zip(prompts, answers, strict=True):
        unique = sorted(set(filter(None, drawn)))
        rng.shuffle(unique)
        right = [answer for answer in unique if is_right(prompt, answer)]
        wrong = [answer for answer in unique if not is_right(prompt, answer)]
        for chosen, rejected in list(zip(right, wrong, strict=False))[:per_prompt]:
            records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    rng.shuffle(records)
    return records
