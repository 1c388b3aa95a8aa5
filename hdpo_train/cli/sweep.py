"""hdpo-train sweep: several α and seeds, each evaluated, and one report."""

import argparse
from collections.abc import Sequence

from transformers.utils import logging

from hdpo_train import quickstart
from hdpo_train.cli.judging import add_problem_options, load_judged_problems
from hdpo_train.data.tokenize import tokenize_pairs
from hdpo_train.evaluation.evaluate import DEFAULT_K, EvalOptions
from hdpo_train.model.loading import in_gguf, load_tokenizer
from hdpo_train.options import TrainingParser, parse_options, with_file
from hdpo_train.parser import Parser, UsageError, WideHelp
from hdpo_train.processes import alone
from hdpo_train.run.output_dir import check_output_dir
from hdpo_train.sweep import report as sweep_report
from hdpo_train.sweep.run import (
    ALPHAS,
    OwnModel,
    Plan,
    Source,
    TaskModel,
    sweep,
    words,
)
from hdpo_train.training import load_data

SET_BY_THE_SWEEP = {
    "--seed",
    "--ref_cache_dir",
    "--overwrite_output_dir",
    "--resume_from_checkpoint",
    "--disable_tqdm",
}
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3)  # of the baseline, beside 1
_DESCRIPTION = """\
Trains with several α and seeds from one model, evaluates every run, and reports what α does: accuracy, pass@k,
diversity and entropy against α with intervals over seeds, a test of "entropy rises with α", and every α beside the
α = 1 model at other temperatures: can temperature alone do it?

  hdpo-train sweep                                    the quickstart's task: an SFT model and pairs are made once
  hdpo-train sweep --model_name_or_path MODEL --dataset_name pairs.jsonl --prompts test.jsonl --checker gsm8k \\
      --alpha 0.9,0.95,1,1.05 --seeds 3 --learning_rate 5e-7 --beta 0.1
                                                      your model; what is not listed below is an option of hdpo-train
  hdpo-train sweep --alpha 0.7 --seeds 5              the same folder again: only what is new is run

It can be stopped and started again at any time. sweep.md and sweep.png in the folder are the report.
"""


def main(argv: list[str]) -> None:
    process = alone()
    options, training = _parser().split(argv, also=TrainingParser()._option_string_actions)
    training = with_file(training)
    for word in training:
        if word.split("=")[0] in SET_BY_THE_SWEEP:
            raise UsageError(f"{word.split('=')[0]} is set by the sweep for every run: leave it out")
    parse_options(training)  # refused before prompts and models are read
    folder = check_output_dir(options.output_dir)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = options.model_name_or_path
    if model is None and options.gguf_file is not None:
        raise ValueError(f"--gguf_file {options.gguf_file} is a file of the model: give --model_name_or_path too")
    model = model and in_gguf(model, options.gguf_file)
    own = (model, options.dataset_name, options.prompts, options.checker)
    source: Source
    if any(own):
        if not all(own) or options.sft_per_seed:
            raise ValueError(
                "a model of your own needs --model_name_or_path, --dataset_name, --prompts and --checker, and no "
                "--sft_per_seed; without all of these the built-in task is taken"
            )
        problems, checker = load_judged_problems(options)
        _check_pairs(model, options.dataset_name, training)
        source, max_new_tokens, batch_size = OwnModel(*own, checker, problems), 256, 64
    else:
        settings = quickstart.Settings()
        source = TaskModel(quickstart.task, settings, options.sft_per_seed)
        training = [*words({**quickstart.training_options(settings), "use_cpu": True, "bf16": False}), *training]
        max_new_tokens, batch_size = quickstart.task.MAX_NEW_TOKENS, quickstart.BATCH_SIZE
    if options.max_new_tokens is not None:
        max_new_tokens = options.max_new_tokens
    if options.batch_size is not None:
        batch_size = options.batch_size
    evaluation = EvalOptions(
        options.num_samples,
        options.temperatures,
        max_new_tokens,
        batch_size,
        k=options.k or tuple(k for k in DEFAULT_K if k <= options.num_samples),
        self_bleu=options.self_bleu,
    )
    if 1.0 not in options.alpha and process.number == 0:
        print("α = 1 (DPO), which the others are compared with, is added.")
    result = sweep(folder, source, Plan(options.alpha, options.seeds, tuple(training), evaluation), process)
    if process.number == 0:
        print(f"\n{sweep_report.markdown(result)}\n\n{folder / sweep_report.REPORT_FILE}, {sweep_report.PLOT_FILE}")


def _check_pairs(model: str, pairs: str, training: Sequence[str]) -> None:
    """Raise what the first run would raise for these pairs, before the model is evaluated, which can take long."""
    script, args = parse_options([*training, *words({"model_name_or_path": model, "dataset_name": pairs})])
    tokenizer = load_tokenizer(model, trust_remote_code=script.trust_remote_code)
    for name, records in zip(("train", "eval"), load_data(script, args), strict=True):
        if records is not None:
            tokenize_pairs(
                records,
                tokenizer,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                on_bad_record=args.on_bad_record,  # type: ignore[arg-type]
                num_proc=args.dataset_num_proc,
                name=name,
            )


def _parser() -> Parser:
    def alphas(text: str) -> tuple[float, ...]:
        try:
            return tuple(float(word) for word in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"numbers with commas between them are needed, got {text!r}") from None

    parser = Parser(
        prog="hdpo-train sweep",
        usage="hdpo-train sweep [--alpha 0.8,1,1.2] [--seeds N] [--option value …] [options of hdpo-train]",
        description=_DESCRIPTION,
        formatter_class=WideHelp,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--alpha",
        type=alphas,
        default=ALPHAS,
        metavar="α,α…",
        help=f"Values of alpha; 1 is always one of them (default: {','.join(map(str, ALPHAS))})",
    )
    add("--seeds", type=int, default=3, metavar="N", help="Runs of every α, with the seeds 0 … N − 1 (default: 3)")
    add(
        "--output_dir",
        default="sweep",
        metavar="FOLDER",
        help="Folder of the sweep; if it holds one, that goes on (default: sweep)",
    )
    add("--sft_per_seed", action="store_true", help="Of the built-in task: make an SFT model and pairs for every seed")
    group = parser.add_argument_group("a model of your own")
    add = group.add_argument
    add(
        "--model_name_or_path", metavar="MODEL", help="Model to train: a local folder or a hub id, or a GGUF file there"
    )
    add("--gguf_file", metavar="FILE", help="GGUF file in that folder or repository")
    add("--dataset_name", metavar="PAIRS", help="Preference pairs: a JSONL or Parquet file, or a hub id")
    add_problem_options(group, required=False)
    group = parser.add_argument_group("evaluation of every run: greedy, and samples at temperature 1")
    add = group.add_argument
    add("--num_samples", type=int, default=16, metavar="N", help="Samples of every prompt (default: 16)")
    add("--k", type=int, nargs="+", metavar="K", help="Values of k for pass@k (default: 1 4 8, up to num_samples)")
    default = " ".join(map(str, TEMPERATURES))
    text = f"Temperatures of the baseline, the α = 1 models; 1 is always one of them (default: {default})"
    add("--temperatures", type=float, nargs="+", default=TEMPERATURES, metavar="T", help=text)
    add(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="Most tokens of a sample (default: 256; built-in task: what an answer needs)",
    )
    add(
        "--batch_size",
        type=int,
        metavar="N",
        help="Samples that are drawn at a time (default: 64; built-in task: 1024)",
    )
    add("--self_bleu", action="store_true", help="Measure self-BLEU too, which is slow and needs the package sacrebleu")
    return parser
