"""The study of training with the sampled gradient: what it says of known figures, and all of it at a tiny size."""

import pytest

from benchmarks import report, sampled_training
from benchmarks.sampled_training import EXACT, NAME, REORDERED, UNITS
from benchmarks.table import Table, read

SAMPLED = "sampled, ε=1/8"


def test_markdown_names_what_differs(capsys):
    table = Table("cpu", NAME, digits=8)
    for seed in range(5):
        for name, shift in ((EXACT, 0.0), (REORDERED, (-1) ** seed), (SAMPLED, 0.5 + 0.001 * seed)):
            for metric in UNITS:
                value = 10 + seed + (shift if name == REORDERED or metric == "entropy" else 0)
                table.add("training", f"seed {seed}", name, metric, (value,), UNITS[metric])
            for metric in ("most entries", "mean entries"):
                table.add("training", f"seed {seed}", name, metric, (10,), "per token")
    text = sampled_training.markdown(table.rows)
    assert "|t| > 4.604 for 5 seeds" in text and f"8 comparisons): entropy with {SAMPLED}." in text
    assert (
        "| entropy, nats per token | 12.0000 | +0.2000 ± 2.2555 (t = +0.41) | +0.5020 ± 0.0033 (t = +709.94) |" in text
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quick"], "--quick needs --out"),
        (["--epsilon", "0.7"], "epsilon must be in (0, 0.5], got 0.7"),
        (["--seeds", "1"], "--seeds"),
    ],
)
def test_main_refuses_before_anything_runs(words, message, capsys):
    with pytest.raises(SystemExit):
        sampled_training.main(words)
    assert message in capsys.readouterr().err


def test_main_runs_the_study(tmp_path, monkeypatch, capsys):
    sampled_training.main(["--quick", "--epsilon", "0.125", "--out", str(tmp_path)])
    rows = read(tmp_path / f"{NAME}.csv")
    metrics = {*UNITS, "most entries", "mean entries"}
    found = {(row["shape"], row["contestant"], row["metric"]): float(row["value"]) for row in rows}
    runs = (EXACT, REORDERED, SAMPLED)
    assert set(found) == {(f"seed {seed}", run, metric) for seed in (0, 1) for run in runs for metric in metrics}
    for seed in ("seed 0", "seed 1"):
        losses = {run: found[seed, run, "final loss"] for run in runs}
        assert len(set(losses.values())) == 3 and all(0 < loss < 10 for loss in losses.values())
        assert abs(losses[SAMPLED] - losses[EXACT]) < 0.1 * losses[EXACT]
        assert found[seed, SAMPLED, "most entries"] == 10
        assert 1 < found[seed, SAMPLED, "mean entries"] < 10
    assert (tmp_path / f"{NAME}.png").stat().st_size > 10_000
    text = (tmp_path / f"{NAME}.md").read_text(encoding="utf-8").strip()
    assert text in capsys.readouterr().out

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    begin, end = f"before\n<!-- {NAME}: begin -->\n", f"<!-- {NAME}: end -->\nafter\n"
    assert report.filled_in(begin + "old\n" + end) == begin + text + "\n" + end
