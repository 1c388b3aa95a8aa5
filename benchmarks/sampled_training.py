"""Does training with the sampled gradient end where training with the exact one ends?

    python -m benchmarks.sampled_training

For every seed the quickstart's model is made, and its preference pairs from it, once. From there H-DPO, α = 0.7, is run
with exact gradients, with sampled ones for every ε, and with exact ones that see the pairs in another order: how far
apart runs end anyway. Whatever else is random is the same in all of them, so they are compared seed by seed.

Test: the differences to exact, one a seed, have mean d and standard error s. A paired t-test calls them different where
|d| > t · s, with t so that this happens to 1% of the comparisons where there is no difference (two-sided; 4.604 for 5
seeds). d ± t · s is also d's 99% confidence interval: what the study cannot exclude. A wide one is no evidence of
equality, so read it beside that of the other data order.

Compared are a trained model's greedy and sampled accuracy and its entropy, on the quickstart's held-out prompts, and
the mean loss of the last 25 steps. Leaves sampled-training.csv (a row a seed, run and figure), .md (the table, which
`python -m benchmarks.report` puts into the documentation) and .png (loss and entropy while training). About ten
minutes on two cores.

ε: the quickstart's vocabulary is 289, so 1/256 is close to the least allowed (1/ε + 2 entries may not exceed it). At
its SFT model a batch's gradient is then off by 0.5% of its norm, about what ε = 2⁻¹⁰ does to d_hidden with a vocabulary
of 32,000. 1/8 is a strong one: 8%, and 10 entries at most. Batches themselves differ by more: one is 78% of its norm
away from the mean of eight. (Measured once, seed 0, 64 pairs a batch; ε = 1/32: 3%, 1/2: 28%.)
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from transformers.utils import logging

from benchmarks.table import RESULTS, Row, Table, read
from hdpo_kernels.checks import check_gradient
from hdpo_kernels.sampled.entries import most_entries
from hdpo_train import quickstart
from hdpo_train.markdown import table
from hdpo_train.quickstart import Settings, task
from hdpo_train.run.report import read_metrics
from hdpo_train.sweep.significance import critical_t, paired

NAME = "sampled-training"
EXACT, REORDERED = "exact", "exact, reordered"
UNITS = {"greedy accuracy": "%", "sampled accuracy": "%", "entropy": "nats per token", "final loss": "nats"}
LAST_LOGS = 5  # log lines, of 5 steps each, that the final loss is the mean of
LEVEL = 0.99  # of the confidence intervals
QUICK = Settings(
    hidden_size=64,
    sft_steps=100,
    sft_batch_size=64,
    sft_learning_rate=5e-3,
    pair_prompts=300,
    batch_size=12,
    epochs=2,
    held_out=8,
    eval_samples=8,
)
Curves = dict[str, list[list[dict[str, Any]]]]  # run -> seed -> log lines


def runs(epsilons: Sequence[float], seed: int) -> dict[str, dict[str, Any]]:
    """Name -> what of HDPOConfig differs from exact."""
    sampled = {f"sampled, ε=1/{1 / e:g}": {"gradient": "sampled", "epsilon": e} for e in epsilons}
    return {EXACT: {}, REORDERED: {"data_seed": seed + 1000}, **sampled}


def study(table: Table, folder: Path, settings: Settings, epsilons: Sequence[float], seeds: int) -> Curves:
    """All runs; their final figures become rows of the table."""
    curves: Curves = {}
    for seed in range(seeds):
        settings = replace(settings, seed=seed)
        prompts, held_out = task.split_prompts(settings.held_out, seed)
        with quickstart.stage(f"seed {seed + 1} of {seeds}: SFT, pairs") as note:
            start, tokenizer = quickstart.sft(prompts, settings)
            for each in epsilons:
                check_gradient("sampled", each, len(tokenizer))
            records = quickstart.make_pairs(start, tokenizer, prompts, settings)
            note(f"{len(records)} pairs")
        for name, options in runs(epsilons, seed).items():
            with quickstart.stage(f"seed {seed + 1} of {seeds}: H-DPO, {name}") as note:
                model = copy.deepcopy(start)
                output_dir = folder / f"seed-{seed}" / name.replace("/", "_")
                options = {"alpha": settings.alpha, **options}
                trainer = quickstart.train(model, tokenizer, records, output_dir, settings, **options)
                result = quickstart.measure(model, tokenizer, held_out, settings)
                note(f"{trainer.state.global_step} steps")
            lines = [line for line in read_metrics(output_dir) if "loss" in line]
            curves.setdefault(name, []).append(lines)
            greedy, sampled = result.greedy, result.sampled[1.0]
            assert greedy is not None and sampled.entropy is not None
            figures = {
                "greedy accuracy": 100 * greedy.accuracy.value,
                "sampled accuracy": 100 * sampled.accuracy.value,
                "entropy": sampled.entropy.value,
                "final loss": statistics.fmean(line["loss"] for line in lines[-LAST_LOGS:]),
            }
            epsilon = options.get("epsilon")
            figures["most entries"] = most_entries(epsilon) if epsilon else len(tokenizer)
            figures["mean entries"] = mean_entries(start, tokenizer, records, epsilon) if epsilon else len(tokenizer)
            for metric, value in figures.items():
                table.add("training", f"seed {seed}", name, metric, (value,), UNITS.get(metric, "per token"))
    return curves


@torch.no_grad()
def mean_entries(model: Any, tokenizer: Any, records: list[dict[str, str]], epsilon: float, most: int = 256) -> float:
    """Expected entries of a row: min(1, p / ε) each, the label's always. Of chosen answers, before training."""
    prompts = [record["prompt"] for record in records[:most]]
    texts = [record["prompt"] + record["chosen"] + tokenizer.eos_token for record in records[:most]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    starts = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    labels = batch["input_ids"][:, 1:]
    answer = (torch.arange(1, labels.shape[1] + 1) >= starts.unsqueeze(1)) & batch["attention_mask"][:, 1:].bool()
    kept = (model(**batch).logits[:, :-1].softmax(-1) / epsilon).clamp(max=1)
    entries = kept.sum(-1) + 1 - kept.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return entries[answer].mean().item()


def markdown(rows: Sequence[Row]) -> str:
    """What the rows say: exact, and every other run's difference to it."""
    figures: dict[tuple[str, str], dict[str, float]] = {}  # run, metric -> seed -> value
    for row in rows:
        figures.setdefault((row["contestant"], row["metric"]), {})[row["shape"]] = float(row["value"])
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    seeds = list(dict.fromkeys(row["shape"] for row in rows))
    values = {key: [by_seed[seed] for seed in seeds] for key, by_seed in figures.items()}
    entries = [
        f"{statistics.fmean(values[name, 'mean entries']):.3g} ({max(values[name, 'most entries']):g})"
        for name in names
    ]
    lines = [["entries per token, mean (at most)", *entries]]
    different = []
    for metric, unit in UNITS.items():
        digits = 2 if unit == "%" else 4
        cells = [f"{statistics.fmean(values[EXACT, metric]):.{digits}f}"]
        for name in names[1:]:
            result = paired(values[name, metric], values[EXACT, metric], LEVEL)
            cells.append(f"{result.mean:+.{digits}f} ± {result.half_width:.{digits}f} (t = {result.t:+.2f})")
            if result.excludes_zero:
                different.append(f"{metric} with {name}")
        lines.append([f"{metric}, {unit}", *cells])
    comparisons, first = len(UNITS) * (len(names) - 1), rows[0]
    notes = (
        "First column: mean over the seeds. Others: mean difference to it, seed by seed, ± half its 99% confidence "
        f"interval; {REORDERED}: the same pairs in another order, for scale.",
        f"Different by a paired t-test (|t| > {critical_t(len(seeds) - 1, LEVEL):.3f} for {len(seeds)} seeds: 1% false "
        f"alarms in each of {comparisons} comparisons): {', '.join(different) or 'none'}.",
        f"Final loss: mean of the last {LAST_LOGS} log lines. {first['device']}, torch {first['torch']}; commit "
        f"{first['commit']}, {first['time'][:10]}; again: `python -m benchmarks.sampled_training`.",
    )
    header = [f"H-DPO on the quickstart, {len(seeds)} seeds", *names]
    return table(header, lines) + "\n\n" + " ".join(notes)


def draw(curves: Curves, path: Path) -> None:
    """Loss and entropy over steps: a thin line a seed, a thick one their mean."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = {"loss": "loss, nats", "entropy": "entropy of the training pairs, nats per token"}
    for axis, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for color, (name, seeds) in enumerate(curves.items()):
            for lines in seeds:
                axis.plot([x["step"] for x in lines], [x[key] for x in lines], color=f"C{color}", lw=0.5, alpha=0.5)
            common = list(zip(*seeds, strict=False))  # seeds differ in their number of pairs
            mean = [statistics.fmean(line[key] for line in lines) for lines in common]
            style = ("-", ":", "--", "-.")[color % 4]  # the curves should lie on one another
            axis.plot([lines[0]["step"] for lines in common], mean, style, color=f"C{color}", lw=2, label=name)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampled_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds", type=int, choices=range(2, 100), default=5, metavar="N", help="at least 2 (default: 5)"
    )
    parser.add_argument(
        "--epsilon",
        type=float,
        nargs="+",
        default=[2**-8, 2**-3],
        metavar="ε",
        help="at least 1/287 (default: 2⁻⁸ 2⁻³)",
    )
    parser.add_argument("--out", type=Path, help=f"folder of {NAME}.csv, .md and .png (default: {RESULTS})")
    parser.add_argument(
        "--quick", action="store_true", help="2 seeds, a tiny model, few steps: does it run? Needs --out"
    )
    options = parser.parse_args(argv)
    if options.quick and options.out is None:
        parser.error("--quick needs --out: its figures mean nothing and must not replace those of the study")
    for epsilon in options.epsilon:
        try:
            check_gradient("sampled", epsilon)
        except ValueError as error:
            parser.error(str(error))

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = options.out or RESULTS
    settings, seeds = (QUICK, 2) if options.quick else (Settings(), options.seeds)
    table = Table("cpu", NAME, digits=8)  # differences of nearly equal figures are taken
    with tempfile.TemporaryDirectory() as folder:
        curves = study(table, Path(folder), settings, options.epsilon, seeds)
    path = table.path(out)
    path.unlink(missing_ok=True)  # an earlier study's seeds are not mixed with these
    table.write(out)
    text = markdown(read(path))
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(curves, path.with_suffix(".png"))
    print(f"\n{text}\n\nWritten: {', '.join(str(path.with_suffix(end)) for end in ('.csv', '.md', '.png'))}")


if __name__ == "__main__":
    main()
