"""Tables in README.md and docs/ say what the CSV says, and nothing else."""

import pytest

from benchmarks import plots, report
from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import CHUNKED, FUSED
from benchmarks.growth import POWER
from benchmarks.shapes import HEADS
from benchmarks.table import RESULTS, Table, read
from hdpo_kernels.lm_head import FUSED_MAX_HIDDEN


def example() -> Table:
    table = Table("cpu")
    table.add("loss", "N=2048", "hdpo_kernels", "time", (1234.0, 1000.0, 1500.0), "ms")
    table.add("loss", "N=2048", "naive", "time", (2000.0, 1900.0, 2100.0), "ms")
    table.add("loss", "N=2048", "naive", OUR_RATIO, (0.617, 0.5, 0.7), "×")
    table.add("loss", "N=512", "hdpo_kernels", "time", (300.0, 290.0, 310.0), "ms")
    table.add_status("loss", "N=512", "naive", "out of memory")
    table.add_status("loss", "N=2048", "cce", "needs CUDA", "cut-cross-entropy")
    table.add_status("loss", "N=512", "cce", "needs CUDA", "cut-cross-entropy")
    table.add("memory", "1024 + 896 tokens", "naive", "peak memory", (1536.0,), "MiB")
    table.add("memory", "256 + 224 tokens", "naive", "peak memory", (384.0,), "MiB")
    for length, mib in ((64, 10.0), (128, 21.0)):
        table.add("growth", f"L, {length} + {7 * length // 8} tokens", "hdpo_train", "peak memory", (mib,), "MiB")
        table.add("growth", f"L, {length} + {7 * length // 8} tokens", "hdpo_train", "CPU time", (30 * mib,), "ms")
    table.add("growth", "L, power of the length, 64 to 128", "hdpo_train", POWER.format("peak memory"), (1.07,), "")
    table.add("accuracy", "2048 + 1792 tokens, bfloat16", "naive", "log-prob of a sequence", (0.18,), "nat")
    return table


def test_tables_show_figures_statuses_and_nothing_else():
    text = report.tables(example().rows)
    lines = text.splitlines()
    assert lines[0].endswith("| hdpo_kernels | naive |")
    assert lines[2] == "| N=512 | 300 ms (290 … 310) | out of memory |"  # shapes by size, not by letters
    assert lines[3] == "| N=2048 | 1,234 ms (1,000 … 1,500) | 0.617 × (0.5 … 0.7) |"
    assert "No figures: cce: needs CUDA." in lines
    assert text.index("| 256 + 224 tokens | 384 MiB |") < text.index("| 1024 + 896 tokens | 1,536 MiB |")
    assert "tokens | 21 MiB |\n| L, power of the length, 64 to 128 | 1.07 |\n\n" in text
    assert "naive: plain PyTorch with all logits." in text


def test_tables_leave_out_what_was_not_measured():
    rows = example().rows
    assert report.tables([]) == ""
    assert "One pair" in report.tables(rows)
    assert "One pair" not in report.tables([row for row in rows if row["question"] != "memory"])
    without = report.tables([row for row in rows if row["metric"] != OUR_RATIO])
    assert "0.617" not in without


def test_head_shows_memory_of_the_newest_commit_as_pairs_get_longer():
    table = example()
    for tokens, ours, theirs in ((256, 82.4, 505.0), (1024, 86.4, 1960.0)):
        table.add("memory", f"V=32 H=5, {tokens} tokens", "hdpo_kernels", "peak memory", (ours,), "MiB")
        table.add("memory", f"V=32 H=5, {tokens} tokens", "trl", "peak memory", (theirs,), "MiB", "trl")
    for row in table.rows:
        older = row["question"] == "memory" and not row["shape"].startswith("V=32")
        row.update(commit="old" if older else "new", time="2026-01-01" if older else "2026-01-02")
    lines = report.head(table.rows).splitlines()
    assert lines[0].endswith("(V=32 H=5, fp32, on a CPU) | our time / theirs | peak memory, 256 tokens | 1024 tokens |")
    assert lines[2:4] == ["| hdpo_kernels | | 82 MiB | 86 MiB |", "| plain PyTorch | 0.62 × | | |"]
    assert lines[4].endswith("| | 505 MiB | 1,960 MiB |")
    assert "not measured yet" in report.head([])


def test_section_without_results_says_so(tmp_path):
    assert report.section("benchmarks", tmp_path).count("not measured yet") == 2
    example().write(tmp_path)
    text = report.section("benchmarks", tmp_path)
    assert "On CUDA: not measured yet" in text and "On CPU" not in text and "1,234 ms" in text


def test_draw_makes_the_plots_of_what_was_measured(tmp_path):
    rows = example().rows
    paths = plots.draw(rows, tmp_path, "cpu")
    assert [path.name for path in paths] == [f"cpu-{name}.png" for name in ("time", "memory", "growth", "accuracy")]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert plots.draw([row for row in rows if row["question"] == "memory"], tmp_path, "cuda") == [
        tmp_path / "cuda-memory.png"
    ]


def test_the_fused_forward_is_used_where_a_row_says_so():
    """hdpo_kernels.lm_head.FUSED_MAX_HIDDEN is what the forward rows of a GPU say, once there are any."""
    times = {
        (row["shape"].split()[0], row["contestant"]): float(row["value"])
        for row in read(RESULTS / "cuda.csv")
        if row["question"] == "forward" and row["metric"] == "time"
    }
    heads = [name for name, contestant in times if contestant == FUSED and (name, CHUNKED) in times]
    if not heads:
        pytest.skip("no GPU has measured the fused forward")
    faster = {name: times[name, FUSED] < times[name, CHUNKED] for name in heads}
    assert faster == {name: HEADS[name].hidden_size <= FUSED_MAX_HIDDEN for name in heads}
