"""The CSV file: what a row says, and what a new run replaces."""

from benchmarks.table import COLUMNS, Table, installed, read


def test_add_writes_value_quartiles_and_where_they_come_from(tmp_path):
    table = Table("cpu")
    table.add("loss", "small", "trl", "time", (2.0, 1.5, 2.5), "ms", "torch")
    table.add("loss", "small", "naive", "peak memory", (7.0,), "MiB")
    table.write(tmp_path)
    first, second = read(tmp_path / "cpu.csv")
    assert tuple(first) == COLUMNS
    assert [first[key] for key in ("value", "low", "high", "unit", "status")] == ["2", "1.5", "2.5", "ms", ""]
    assert first["torch"] == first["peer"] == installed("torch") and first["commit"] and first["device"]
    assert second["low"] == second["high"] == second["peer"] == "" and second["time"].endswith("+00:00")


def test_write_replaces_the_shapes_measured_now_and_keeps_the_others(tmp_path):
    def measure(*figures: tuple[str, str, str, float]) -> list[tuple[str, str, str, str]]:
        table = Table("cpu")
        for question, shape, contestant, value in figures:
            table.add(question, shape, contestant, "time", (value,), "ms")
        table.write(tmp_path)
        table.write(tmp_path)  # once after every shape
        rows = read(tmp_path / "cpu.csv")
        return [(row["question"], row["shape"], row["contestant"], row["value"]) for row in rows]

    measure(("loss", "a", "ours", 1), ("loss", "a", "gone", 2), ("loss", "b", "ours", 3), ("memory", "a", "ours", 4))
    assert measure(("loss", "a", "ours", 9)) == [
        ("loss", "b", "ours", "3"),
        ("memory", "a", "ours", "4"),
        ("loss", "a", "ours", "9"),
    ]


def test_write_drops_other_shapes_of_questions_that_were_measured_whole(tmp_path):
    for shape in ("old", "new"):
        table = Table("cpu")
        for question in ("loss", "memory"):
            table.add(question, shape, "ours", "time", (1.0,), "ms")
        table.write(tmp_path, whole=["memory"])
    rows = [(row["question"], row["shape"]) for row in read(tmp_path / "cpu.csv")]
    assert rows == [("loss", "old"), ("loss", "new"), ("memory", "new")]


def test_add_status_is_a_row_without_a_figure(tmp_path):
    table = Table("cpu")
    table.add_status("loss", "a", "cce", "needs CUDA", "no-such-package")
    (row,) = table.rows
    assert (row["contestant"], row["status"], row["metric"], row["value"]) == ("cce", "needs CUDA", "", "")
