"""The sampled gradient's question, small: its rows say what the estimator promises, and table and plot show them."""

import functools

import pytest

from benchmarks import __main__ as main
from benchmarks import plots, report, sampled
from benchmarks.contestants import CONTESTANTS, NAIVE, OURS, Contestant, naive_logp
from benchmarks.sampled import FILTERED, GEMM, SAMPLED, over
from benchmarks.table import Table, installed, read

ZIPF, SOFTER, TAUGHT = sampled.shapes("cpu", quick=True)
NO_CCE = "needs CUDA" if installed("cut-cross-entropy") else "not installed"
EXPONENTS = {ZIPF.name: (-8, -10, -12), TAUGHT.name: (-6, -7, -8)}  # ε falls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    tasks = [("sampled", shape) for shape in (ZIPF, TAUGHT)]
    main.run(tasks, Table("cpu"), list(CONTESTANTS), rounds=1, minutes=5, out=folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return read(folder / "cpu.csv")


@pytest.fixture(params=EXPONENTS)
def shape(request):
    return request.param


@pytest.fixture
def figure(rows, shape):
    rows = [row for row in rows if row["shape"] == shape and row["metric"]]
    values = {(row["contestant"], row["metric"]): float(row["value"]) for row in rows}
    return lambda contestant, metric, e=0: values[contestant.format(e), metric]


def test_measure_nobody_fails_and_everyone_is_there(rows, shape):
    rows = [row for row in rows if row["shape"] == shape]
    names = {name.format(e) for name in (SAMPLED, FILTERED) for e in EXPONENTS[shape]}
    assert {row["contestant"] for row in rows} == {GEMM, OURS, NAIVE, "cce", "cce unfiltered", "logits", *names}
    statuses = {row["contestant"]: row["status"] for row in rows if row["status"]}
    assert statuses == {"cce": NO_CCE, "cce unfiltered": NO_CCE}
    timed = {row["contestant"] for row in rows if row["metric"] == "time"}
    assert timed == {GEMM, OURS, NAIVE, *(SAMPLED.format(e) for e in EXPONENTS[shape])}


def test_measure_errors_fall_with_epsilon_and_a_filter_loses_more_of_d_hidden(figure, shape):
    for metric in ("d_hidden, relative", "d_weight, relative"):
        errors = [figure(SAMPLED, metric, e) for e in EXPONENTS[shape]]
        assert 0.3 > errors[0] > errors[1] > errors[2] > figure(OURS, metric)
    for e in EXPONENTS[shape]:
        assert figure(FILTERED, "d_hidden, relative", e) > 5 * figure(SAMPLED, "d_hidden, relative", e)


def test_measure_entries_are_within_their_bound(figure, shape):
    for e in EXPONENTS[shape]:
        bound = 2**-e + 2
        assert figure(SAMPLED, "bound on entries of a row", e) == bound
        assert bound >= figure(SAMPLED, "most entries of a row", e) > figure(SAMPLED, "entries per row", e)
        assert figure(SAMPLED, "entries per row", e) > figure(FILTERED, "entries per row", e) >= 1


def test_measure_ratios_are_those_of_the_times(figure, shape):
    for name in (OURS, NAIVE, SAMPLED.format(EXPONENTS[shape][0])):
        assert figure(name, over(GEMM)) == pytest.approx(figure(name, "time") / figure(GEMM, "time"), rel=2e-3)


def test_measure_hits_the_entropy(rows):
    (row,) = [row for row in rows if row["metric"] == "mean entropy" and row["shape"] == ZIPF.name]
    assert float(row["value"]) == pytest.approx(ZIPF.entropy, rel=0.05)


def test_measure_does_not_time_a_wrong_loss():
    wrong = Contestant(NAIVE, "", lambda problem: 1.1 * naive_logp(problem))
    table = Table("cpu")
    sampled.measure(table, ZIPF._replace(entropy=None), [wrong], rounds=1)
    (row,) = [row for row in table.rows if row["contestant"] == NAIVE]
    assert "wrong: relative error" in row["status"] and not row["metric"]


def test_filtered_logp_is_naive_with_a_tiny_epsilon():
    problem = sampled.make_problem(ZIPF._replace(entropy=None), "cpu")
    name = "naive"
    exact = Contestant(name, "", naive_logp).forward_backward(problem)
    filtered = functools.partial(sampled.filtered_logp, epsilon=1e-30)
    for actual, expected in zip(Contestant(name, "", filtered).forward_backward(problem), exact, strict=True):
        assert sampled.relative_error(actual, expected) < 1e-4


def test_tables_and_plots_show_a_line_and_a_panel_per_shape(folder, rows):
    (picture,) = [path for path in plots.draw(rows, folder, "cpu") if path.name == "cpu-sampled.png"]
    assert picture.stat().st_size > 10_000
    header, _, *lines = report.tables(rows).splitlines()[:4]
    assert header.startswith("| Sampled gradient, forward + backward | ε | time / one GEMM | / exact | / naive |")
    assert lines[0].startswith(f"| {ZIPF.name} | 2^-10 | ") and lines[1].startswith(f"| {TAUGHT.name} | 2^-8 | ")
    assert "/ 1,026 |" in lines[0] and "/ 258 |" in lines[1] and "cce" not in header
    assert f"No figures: cce: {NO_CCE}. cce unfiltered: {NO_CCE}." in report.tables(rows)
