"""What does α do? The claims of H-DPO (arXiv 2411.07595), put to the test on tasks that a program can check.

    python -m benchmarks.study             on the CPU: the quickstart's task, five seeds
    python -m benchmarks.study --real      on the CPU: a pretrained model, short instructions; its settings: real.py
    python -m benchmarks.study --larger    on a CUDA GPU: a Llama of 28M parameters, arithmetic in words

Every seed has its own SFT model, pairs and held-out prompts, and every α of a seed starts from these: seeds are blocks,
and all comparisons are made within them. Leaves in benchmarks/study <name>.md (the report; docs/what-alpha-does.md
has its beginning), <name>.png and <name>.json (all figures), name: study or larger. A run that was stopped is gone on
with (--work).

The quickstart's task as it is leaves nothing to see: pass@8 is 99.9 % before H-DPO. So SFT is cut from 220 to 130
steps, which leaves 39 to 54 % greedy accuracy and 75 to 89 % pass@8 before H-DPO with seeds 0 to 3 (125 steps: 14 to
43 % and 65 to 80 %; 135 steps: 46 to 83 % and 85 to 95 %). β is 0.5 instead of 2: with 2 the mean margin before
training, (α − 1)β(ρ_w − ρ_l), is +3.2 for α = 1.5, where a pair hardly weighs any more, and DPO itself moves little
(greedy accuracy 21 to 45 %; with 0.5, 42 to 82 %). The learning rate stays: with 4e-4 instead of 1e-4, DPO made greedy
accuracy worse (76 to 59 %). β and learning rate were tried with seed 0 alone, and 140 to 150 steps of SFT.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.harness import use_one_device
from benchmarks.real import data
from benchmarks.study import arithmetic, real, real_report
from benchmarks.table import commit, device_name, installed
from hdpo_train import quickstart
from hdpo_train.evaluation.evaluate import EvalOptions
from hdpo_train.markdown import table
from hdpo_train.quickstart import Settings
from hdpo_train.sweep import report as sweep_report
from hdpo_train.sweep.report import (
    Metric,
    Sweep,
    against_dpo,
    against_temperature,
    frontier_metrics,
    metrics,
    verdict,
)
from hdpo_train.sweep.run import Plan, TaskModel, sweep, words
from hdpo_train.sweep.significance import Interval, interval

FOLDER = Path(__file__).parent
ALPHAS = (0.6, 0.8, 1.0, 1.25, 1.6)
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3)
SEEDS = 5
SMALL = Settings(sft_steps=130, beta=0.5)
LARGER = Settings(
    hidden_size=512,
    num_layers=8,
    vocab_size=600,
    sft_steps=2000,
    sft_batch_size=256,
    sft_learning_rate=5e-4,
    pair_prompts=8000,
    beta=0.5,
    learning_rate=1e-5,
    held_out=500,
)
QUICK = Settings(
    hidden_size=64,
    sft_steps=80,
    sft_batch_size=48,
    sft_learning_rate=1e-2,
    pair_prompts=150,
    batch_size=16,
    epochs=1,
    held_out=8,
)
SHOWN = ("greedy accuracy", "sampled accuracy", "pass@8", "distinct right", "entropy")  # in the first table


def study(
    work: Path,
    task: quickstart.Task,
    settings: Settings,
    *,
    device: str = "cpu",
    alphas: Sequence[float] = ALPHAS,
    seeds: int = SEEDS,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Sweep:
    """The sweep behind a study, in the folder `work`."""
    options = quickstart.training_options(settings) | ({"use_cpu": True, "bf16": False} if device == "cpu" else {})
    evaluation = EvalOptions(
        settings.eval_samples,
        tuple(temperatures),
        task.MAX_NEW_TOKENS,
        quickstart.BATCH_SIZE,
        k=(1, 4, 8),
        self_bleu=False,
    )
    source = TaskModel(task, settings, per_seed=True, device=device)
    return sweep(work, source, Plan(tuple(alphas), seeds, tuple(words(options)), evaluation))


def markdown(result: Sweep, plot: str, about: str) -> str:
    """The report; what stands before its first section is what docs/what-alpha-does.md says."""
    return "\n\n".join(
        [
            f"# What α does: {result.title}",
            f"{result.title}; {result.seeds} seeds, each with its own SFT model, pairs and prompts. {about} Means ± "
            f"half their 95 % confidence interval (Student's t over seeds); [plots]({plot}).",
            sweep_report.figures_table(result, SHOWN),
            claims_table(result),
            "## In full",
            sweep_report.markdown(result).replace("\n## ", "\n### "),
            f"![{plot}]({plot})",
        ]
    )


def claims_table(result: Sweep) -> str:
    """What the paper says, and for each α whether it holds here."""
    alphas = [alpha for alpha in sorted(result.runs) if alpha != 1]
    lines = []
    compared = 0
    for claim, metric, differences in claims(result):
        compared += sum(difference is not None for difference in differences.values())
        texts = [_verdict(differences[alpha], metric) if alpha in differences else "" for alpha in alphas]
        lines.append([claim, *texts])
    note = (
        "Differences to α = 1, seed by seed, ± half their 95 % confidence interval. A claim holds, or its opposite, "
        "where that excludes zero; of comparisons without any difference one in twenty does by chance, and here are "
        f"{compared}. At equal entropy: α = 1 at the temperature that gives it the entropy that α has at temperature 1."
    )
    verdicts = table(["", *(f"α = {alpha:g}" for alpha in alphas)], lines)
    return "\n\n".join([sweep_report.trend_sentence(result), verdicts, note])


def claims(result: Sweep) -> list[tuple[str, Metric, dict[float, Interval | None]]]:
    """(claim, metric that it says is higher than for α = 1, α -> difference to it; None: cannot be compared)."""
    found = metrics(result)
    said: list[tuple[str, Metric, dict[float, Interval | None]]] = []
    for names, claim, concerned in (
        (("greedy accuracy", "sampled accuracy"), "α < 1 raises", lambda alpha: alpha < 1),
        (("pass@8", "distinct right", "distinct-2"), "α > 1 raises", lambda alpha: alpha > 1),
    ):
        for name in names:
            differences = against_dpo(result, found[name])
            said.append((f"{claim} {name}", found[name], {a: d for a, d in differences.items() if concerned(a)}))
    for metric in frontier_metrics(result):
        matched: dict[float, Interval | None] = {}
        for alpha, matches in against_temperature(result).items():
            reached = [match.differences[metric.name] for match in matches if match]
            matched[alpha] = interval(reached) if len(reached) == result.seeds else None
        said.append((f"α raises {metric.name} at equal entropy", metric, matched))
    return said


def _verdict(difference: Interval | None, metric: Metric) -> str:
    if difference is None:
        return "entropy out of the temperatures' reach"
    figures = f"{metric.show(difference.mean, '+').removesuffix(metric.unit)} ± {metric.show(difference.half_width)}"
    return f"{figures}: {verdict(difference, 'holds', 'the opposite')}"


def study_real(seeds: Sequence[int], work: Path, out: Path, model: Path, settings: real.Settings) -> None:
    """The runs of these seeds that are not there yet (without seeds: none), and the report of all that are."""
    study = real.Study(model, work, settings)
    study.run(seeds)
    rows = study.rows()
    if not rows:
        sys.exit(f"python -m benchmarks.study --real: no run is finished in {study.folder} yet")
    out.mkdir(parents=True, exist_ok=True)
    real.write_rows(rows, out / "real.csv")
    about = f"{device_name('cpu')}, torch {installed('torch')}; commit {commit()}, {date.today()}; again: "
    real_report.draw(rows, settings.epochs, out / "real.png")
    text = real_report.markdown(rows, settings, about + "`python -m benchmarks.study --real`.", "real.png")
    (out / "real.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nWritten: {', '.join(str(out / f'real.{end}') for end in ('md', 'png', 'csv'))}")


def main(argv: list[str] | None = None) -> None:
    use_one_device()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--larger", action="store_true", help="the larger study; needs a CUDA GPU")
    parser.add_argument("--real", action="store_true", help="the study on a pretrained model; needs the extra real")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="*",
        choices=real.SEEDS,
        metavar="SEED",
        help="with --real: run these seeds only (default: all; none given: report what is there)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="2 seeds, a tiny model, few steps: does it run? Needs --out"
    )
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: {FOLDER})")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of models and samples, kept (default: a temporary one, --real: .real/study)",
    )
    options = parser.parse_args(argv)
    if options.quick and (options.out is None or options.larger or options.real):
        parser.error("--quick needs --out, for its figures mean nothing, and is not for --larger or --real")
    if options.real and options.larger:
        parser.error("--real and --larger are two studies: give one of them")
    if options.seeds is not None and not options.real:
        parser.error("--seeds is for --real")
    if options.real and (reason := data.missing()):
        parser.error(f"--real: {reason}")
    if options.larger and not torch.cuda.is_available():
        parser.error("--larger needs a CUDA GPU, and there is none here; without it the study runs on the CPU")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.real:
        seeds = real.SEEDS if options.seeds is None else options.seeds
        work = options.work or data.CACHE / "study"
        study_real(seeds, work, options.out or FOLDER, data.model_folder(), real.Settings())
        return
    name, device = ("larger", "cuda") if options.larger else ("study", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder) / "sweep"
        if options.larger:
            result = study(work, arithmetic, LARGER, device="cuda")
        elif options.quick:
            few = {"alphas": (0.7, 1.0, 1.4), "temperatures": (0.7, 1.3)}
            result = study(work, quickstart.task, QUICK, seeds=2, **few)  # type: ignore[arg-type]
        else:
            result = study(work, quickstart.task, SMALL)
    again = "python -m benchmarks.study" + " --larger" * options.larger
    about = f"{device_name(device)}, torch {installed('torch')}; commit {commit()}, {date.today()}; again: `{again}`."
    out = options.out or FOLDER
    out.mkdir(parents=True, exist_ok=True)
    result.save(out / f"{name}.json")
    sweep_report.draw(result, out / f"{name}.png")
    text = markdown(result, f"{name}.png", about)
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nWritten: {', '.join(str(out / f'{name}.{end}') for end in ('md', 'png', 'json'))}")


if __name__ == "__main__":
    main()
