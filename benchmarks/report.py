"""Rewrite the README's table of measurements from benchmarks/results: python -m benchmarks.report"""

from pathlib import Path

from benchmarks.harness import RESULTS, read

README = Path(__file__).parent.parent / "README.md"
# (question, contestant, metric) -> what the README calls it
CPU_LINES = {
    ("loss", "hdpo_kernels", "time / three GEMMs"): "forward + backward, as a multiple of its three bare GEMMs",
    ("loss", "hdpo_kernels", "time / trl"): "… of TRL 1.16's `ChunkedLogProbFunction` with the same loss on top",
    ("loss", "hdpo_kernels", "time / naive"): "… of plain PyTorch (full logits)",
    (
        "memory",
        "hdpo_kernels",
        "peak / naive",
    ): "peak memory above inputs and gradients, as a multiple of plain PyTorch's",
    ("memory", "hdpo_kernels", "peak / trl"): "… of TRL's",
    ("accuracy", "hdpo_kernels", "log-prob of a sequence"): "log-prob of a sequence, largest error against fp64",
    ("accuracy", "naive", "log-prob of a sequence"): "… of plain PyTorch",
}


def table(folder: Path = RESULTS) -> str:
    """Markdown: one row per measured figure; what nobody measured is not there."""
    lines = []
    for device in ("cpu", "cuda"):
        path = folder / f"{device}.csv"
        if not path.exists():
            lines += [f"On {device.upper()}: not measured yet (`python -m benchmarks --device {device}`).", ""]
            continue
        rows = read(path)
        first = rows[0]
        lines += [
            f"{first['device']}; torch {first['torch']}, commit {first['commit']}, {first['time'][:10]}. "
            f"All rows: `benchmarks/results/{device}.csv`; again: `python -m benchmarks --device {device}`.",
            "",
            "| figure | shape | median (quartiles) |",
            "|---|---|---|",
        ]
        for key, label in CPU_LINES.items():
            for row in rows:
                if (row["question"], row["contestant"], row["metric"]) == key:
                    spread = f" ({float(row['low']):.3g} … {float(row['high']):.3g})" if row["low"] else ""
                    lines.append(f"| {label} | {row['shape']} | {float(row['value']):.3g} {row['unit']}{spread} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def filled_in(text: str) -> str:
    """The README's text with what stands between its markers written anew."""
    quickstart = RESULTS / "quickstart.md"
    contents = {"benchmarks": table(), "quickstart": quickstart.read_text(encoding="utf-8").strip()}
    for name, content in contents.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = before + begin + content + "\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    README.write_text(filled_in(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
