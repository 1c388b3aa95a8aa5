"""A model on prompts whose answers a program checks: samples, judged and scored."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hdpo_train.evaluation.checkers import Checker, unit_test_program
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.sampler import Sampler, SamplingOptions
from hdpo_train.evaluation.samples import Sample
from hdpo_train.evaluation.scores import Evaluation, Scores, Unjudged, score, sentence_bleu
from hdpo_train.evaluation.worker import Fault
from hdpo_train.model.fingerprint import weights_fingerprint

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EvalOptions(SamplingOptions):
    """What to draw and what to report. Greedy completions are drawn whatever the temperatures."""

    k: tuple[int, ...] = (1, 4, 8)  # of pass@k
    self_bleu: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "k", tuple(self.k))
        if bad := [k for k in self.k if not 1 <= k <= self.num_samples]:
            raise ValueError(f"pass@{bad[0]} needs 1 <= k <= num_samples, and num_samples = {self.num_samples}")
        if self.self_bleu:
            sentence_bleu()  # is it there? Known before anything is drawn

    @property
    def sampling(self) -> SamplingOptions:
        temperatures = (0.0, *(t for t in self.temperatures if t))
        return SamplingOptions(
            self.num_samples, temperatures, self.max_new_tokens, self.batch_size, self.seed, self.stop
        )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    checker: Checker,
    options: EvalOptions,
    *,
    name: str,
    samples_file: Path | None = None,
) -> Evaluation:
    """Greedy completions of every prompt, and samples at every temperature, judged by the checker and scored.

    name: of the model in reports. samples_file: a JSONL that samples are appended to while they are drawn, and from
    which a later call with the same settings goes on.

    Raises ValueError if there is no prompt, or the file holds samples of another model, other prompts or settings.
    """
    sampler = Sampler(problems, tokenizer, options.sampling, name=name)
    if samples_file is not None:
        sampler.keep_in(samples_file, weights_fingerprint(model))
    return grade(name, problems, checker, sampler.run(model), options)


def grade(
    name: str, problems: Sequence[Problem], checker: Checker, samples: Sequence[Sample], options: EvalOptions
) -> Evaluation:
    """Judge and score samples, whichever engine drew them; every prompt needs as many at a temperature."""
    by_temperature: dict[float, list[list[Sample]]] = {}
    for sample in samples:
        by_temperature.setdefault(sample.temperature, [[] for _ in problems])[sample.prompt].append(sample)
    for temperature, groups in by_temperature.items():
        fewest, most = min(groups, key=len), max(groups, key=len)
        if len(fewest) < len(most):
            raise ValueError(
                f"{name}: prompt {groups.index(fewest) + 1} has {len(fewest)} samples at temperature {temperature:g}, "
                f"prompt {groups.index(most) + 1} has {len(most)}; every prompt needs as many"
            )
    if cut := sum(sample.ended is False for sample in samples):
        share = cut / len(samples)
        logger.warning(f"{name}: {cut} completions ({share:.1%}) did not end within max_new_tokens; judged as they are")
    scores: dict[float, Scores] = {}
    faults: dict[str, list[int]] = {}  # the prompts of each kind, a number for each completion
    with tqdm(total=len(samples), desc=f"Judging, {name}", unit="sample", leave=False) as progress:
        for temperature, groups in by_temperature.items():
            right = []
            for number, (problem, group) in enumerate(zip(problems, groups, strict=True), 1):
                judged = verdicts(checker, problem, [sample.completion for sample in group], number)
                of_group = [judged[sample.completion] for sample in group]
                for verdict in of_group:
                    if isinstance(verdict, Fault):
                        faults.setdefault(verdict.kind, []).append(number)
                right.append([verdict is True for verdict in of_group])
                progress.update(len(group))
            known = all(sample.entropy is not None and sample.num_tokens for group in groups for sample in group)
            scores[temperature] = score(
                [[sample.completion for sample in group] for group in groups],
                right,
                temperature=temperature,
                k=options.k if temperature else (),
                nats=[sum(s.entropy or 0 for s in group) for group in groups] if known else None,
                tokens=[sum(s.num_tokens or 0 for s in group) for group in groups] if known else None,
                self_bleu=options.self_bleu,
                seed=options.seed,
            )
    unjudged = [Unjudged(kind, len(prompts), min(prompts)) for kind, prompts in faults.items()]
    unjudged.sort(key=lambda each: -each.completions)
    evaluation = Evaluation(name, len(problems), scores.pop(0.0, None), scores, tuple(unjudged))
    if line := evaluation.faults():
        logger.warning(f"{name}: {line}")
    return evaluation


def check_records(checker: Checker, problems: Sequence[Problem], spec: str) -> None:
    """Refuse, before a model is loaded, what leaves nothing to judge: ValueError names the first prompt.

    Every record must have what gsm8k, choice, regex or unit_tests needs. A function may fail on some completions: it is
    refused where it fails in the same way on an empty one, a sentence and texts of the record.
    """
    if spec == "unit_tests":
        for number, problem in enumerate(problems, 1):
            judge(lambda *of: bool(unit_test_program(*of)), problem, "", number)
    if spec.split(":")[0] in ("gsm8k", "choice", "regex"):
        for number, problem in enumerate(problems, 1):
            with suppress(Fault):
                judge(checker, problem, "", number)
        return
    texts = [value for value in problems[0].record.values() if isinstance(value, str)][:3]
    tries = [(1, problems[0], text) for text in ("", "The answer is 12.", *texts)]
    tries += [(number, problem, "") for number, problem in enumerate(problems[1:3], 2)]
    faults: list[Fault] = []
    for number, problem, text in tries:
        try:
            judge(checker, problem, text, number)
            return
        except Fault as fault:
            faults.append(fault)
        if faults[-1].what != faults[0].what:
            return
    raise ValueError(
        f"prompt 1: {faults[0]}, and the same on each of {len(tries)} completions that were tried: an empty one, a "
        "sentence, texts of the record. A checker returns False for a completion that it cannot read"
    )


def verdicts(checker: Checker, problem: Problem, completions: Iterable[str], number: int) -> dict[str, bool | Fault]:
    """Of each different completion, judged once: is it right? Or the Fault that took the verdict's place."""
    found: dict[str, bool | Fault] = {}
    for completion in dict.fromkeys(completions):
        try:
            found[completion] = judge(checker, problem, completion, number)
        except Fault as fault:
            found[completion] = fault
    return found


def judge(checker: Checker, problem: Problem, completion: str, number: int) -> bool:
    """The checker's verdict. Raises Fault where it has none, and ValueError, with the prompt's number, where the record
    is not what the checker needs."""
    try:
        return bool(checker(problem, completion))
    except Fault:
        raise
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from error


DEFAULT_K = (1, 4, 8)
