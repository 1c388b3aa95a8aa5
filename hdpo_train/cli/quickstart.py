"""hdpo-train quickstart: the embedded task, from nothing to a table."""

from hdpo_kernels.pair import PairOptions
from hdpo_train.parser import Parser
from hdpo_train.quickstart import Settings, run
from hdpo_train.run.output_dir import check_output_dir


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="hdpo-train quickstart",
        allow_abbrev=False,
        description="H-DPO from nothing, on this machine: a small model learns a task from demonstrations, is "
        "trained on pairs of its own answers with α = 1 (DPO) and α < 1, and is measured before and after.",
    )
    parser.add_argument("--output_dir", default="hdpo-quickstart", help="Folder for all results (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=Settings.seed, help="Seed of everything random (default: %(default)s)"
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=Settings.alpha,
        help="Value of alpha to compare with α = 1 (default: %(default)s)",
    )
    options = parser.parse(argv)
    PairOptions(options.alpha, Settings.beta)  # raises for an alpha out of range
    if f"{options.alpha:g}" == "1":
        raise ValueError("--alpha is compared with α = 1: give another value")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {options.seed}")
    try:
        run(check_output_dir(options.output_dir), Settings(seed=options.seed, alpha=options.alpha))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; a quickstart starts from the beginning, and replaces what is in {options.output_dir}"
        ) from None
