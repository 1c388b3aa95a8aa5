"""Products of sampled rows with matrices, torch's and Triton's, against dense products in fp64."""

import importlib

import pytest
import torch
from torch import Tensor

from hdpo_kernels.sampled.entries import Entries
from hdpo_kernels.testing import assert_as_accurate_as

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "triton"])
def products(request):
    return importlib.import_module(f"hdpo_kernels.sampled.{request.param}")


@pytest.fixture
def triton_products():
    return importlib.import_module("hdpo_kernels.sampled.triton")


@pytest.fixture
def device(products) -> str:
    return TRITON_DEVICE if products.__name__.endswith("triton") else "cpu"


def make_entries(
    counts: list[int], most: int, vocab: int, device: str, *, in_all: int | None = None, dtype=torch.float32
) -> Entries:
    """Rows of so many entries each; what memory has behind them is NaN and columns outside the vocabulary."""
    torch.manual_seed(sum(counts))
    n = len(counts)
    columns = torch.full((n, most), 2**31 - 1, dtype=torch.int32)
    columns[:, 1::2] = -(2**31)
    values = torch.full((n, most), torch.nan, dtype=dtype)
    for row, count in enumerate(counts):
        chosen = torch.randperm(vocab)
        if in_all is not None:
            chosen = torch.cat([torch.tensor([in_all]), chosen[chosen != in_all]])
        columns[row, :count] = chosen[:count].sort().values.int()
        values[row, :count] = torch.randn(count, dtype=dtype)
    return Entries(columns.to(device), values.to(device), torch.tensor(counts, dtype=torch.int32, device=device))


def some_counts(n: int, most: int) -> list[int]:
    """Of n rows: an empty one, a full one, others between."""
    counts = torch.randint(most + 1, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    counts[:2] = [most, 0][:n]
    return counts


def dense(entries: Entries, scale: Tensor, vocab: int) -> Tensor:
    """(n, V) fp64 on the CPU: the rows with their zeros, scaled."""
    out = torch.zeros(len(entries.counts), vocab, dtype=torch.float64)
    columns, values, counts = (t.cpu() for t in entries)
    for row, count in enumerate(counts.tolist()):
        out[row, columns[row, :count].long()] = values[row, :count].double() * scale[row].double().cpu()
    return out


def check_gather(products, entries: Entries, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    rows = dense(entries, scale, len(weight))
    actual = products.gather(entries, weight, scale, dtype)
    assert (actual.dtype, actual.device) == (dtype, weight.device)
    truth, low = (rows.to(full) @ weight.cpu().to(full) for full in (torch.float64, torch.float32))
    if actual.numel():
        assert_as_accurate_as(actual.cpu(), low.to(dtype), truth, name="d_hidden")
    assert actual.shape == truth.shape


def check_gather_transposed(
    products, entries: Entries, hidden: Tensor, scale: Tensor, vocab: int, dtype: torch.dtype
) -> None:
    columns = dense(entries, scale, vocab).T
    results = products.gather_transposed(entries, hidden, scale, vocab, dtype, True, True)
    truths, lows = (
        (columns.to(full) @ hidden.cpu().to(full), columns.to(full).sum(1)) for full in (torch.float64, torch.float32)
    )
    for name, actual, low, truth in zip(("d_weight", "d_bias"), results, lows, truths, strict=True):
        assert (actual.dtype, actual.device) == (dtype, hidden.device)
        assert_as_accurate_as(actual.cpu(), low.to(dtype), truth, name=name)


def check_both(
    products, device: str, n: int, vocab: int, hidden_size: int, most: int, table=torch.float32, out=torch.float32
) -> None:
    most = min(most, vocab)
    entries = make_entries(some_counts(n, most), most, vocab, device)
    torch.manual_seed(n + vocab + hidden_size)
    scale = torch.randn(n, device=device)
    weight, hidden = (torch.randn(rows, hidden_size, device=device).to(table) for rows in (vocab, n))
    check_gather(products, entries, weight, scale, out)
    check_gather_transposed(products, entries, hidden, scale, vocab, out)


@pytest.mark.parametrize(
    ("n", "vocab", "hidden_size", "most"),
    [(1, 1, 1, 1), (1, 97, 24, 10), (7, 97, 100, 97), (40, 97, 1, 30), (7, 1, 24, 1), (3, 1031, 24, 600),
     (7, 97, 1030, 30)],
)  # fmt: skip
def test_products_match_dense_ones_at_ragged_sizes(products, device, n, vocab, hidden_size, most):
    check_both(products, device, n, vocab, hidden_size, most)


@pytest.mark.parametrize("table", FLOATS)
@pytest.mark.parametrize("out", FLOATS)
def test_products_round_once_to_the_dtype_asked_for(products, device, table, out):
    check_both(products, device, 7, 97, 24, 20, table, out)


def test_torch_products_of_fp64_keep_fp64():
    products = importlib.import_module("hdpo_kernels.sampled.torch")
    entries = make_entries([5, 0, 9], 9, 23, "cpu", dtype=torch.float64)
    weight, hidden = torch.randn(23, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    scale = torch.randn(3, dtype=torch.float64)
    rows = dense(entries, scale, 23)
    d_hidden = products.gather(entries, weight, scale, torch.float64)
    d_weight, d_bias = products.gather_transposed(entries, hidden, scale, 23, torch.float64, True, True)
    for actual, truth in ((d_hidden, rows @ weight), (d_weight, rows.T @ hidden), (d_bias, rows.sum(0))):
        torch.testing.assert_close(actual, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("counts", [[], [0, 0, 0]])
def test_products_of_rows_without_entries_are_zero(products, device, counts, dtype):
    n = len(counts)
    entries = make_entries(counts, 5, 11, device)
    scale = torch.full((n,), torch.inf, device=device)  # multiplies nothing
    weight, hidden = torch.randn(11, 6, device=device, dtype=dtype), torch.randn(n, 6, device=device, dtype=dtype)
    d_hidden = products.gather(entries, weight, scale, dtype)
    d_weight, d_bias = products.gather_transposed(entries, hidden, scale, 11, dtype, True, True)
    for actual, shape in ((d_hidden, (n, 6)), (d_weight, (11, 6)), (d_bias, (11,))):
        assert actual.dtype == dtype
        assert torch.equal(actual, torch.zeros(shape, dtype=dtype, device=device))


def test_gather_transposed_makes_only_what_is_needed(products, device):
    entries = make_entries([4, 7], 7, 11, device)
    scale, hidden = torch.randn(2, device=device), torch.randn(2, 6, device=device)

    def run(*needs: bool):
        return products.gather_transposed(entries, hidden, scale, 11, torch.float32, *needs)

    d_weight, d_bias = run(True, True)
    only_weight, no_bias = run(True, False)
    no_weight, only_bias = run(False, True)
    assert no_bias is None and no_weight is None and run(False, False) == (None, None)
    assert torch.equal(only_weight, d_weight) and torch.equal(only_bias, d_bias)


def test_d_bias_alone_does_not_read_the_hidden_states(products, device):
    entries = make_entries([4, 7], 7, 11, device)
    scale = torch.randn(2, device=device)
    hidden = torch.full((2, 6), torch.nan, device=device)
    _, d_bias = products.gather_transposed(entries, hidden, scale, 11, torch.float32, False, True)
    assert_as_accurate_as(d_bias.cpu(), dense(entries, scale, 11).sum(0).float(), dense(entries, scale, 11).sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_that_every_row_has_is_summed_over_all_of_them(products, device, dtype):
    # more rows than what Triton's kernels take for long, and than one group of their sort has
    n, vocab = 300, 23
    entries = make_entries([3, *[1 + t % 5 for t in range(n - 1)]], 5, vocab, device, in_all=11)
    scale, hidden = torch.rand(n, device=device), torch.randn(n, 200, device=device).to(dtype)
    check_gather_transposed(products, entries, hidden, scale, vocab, dtype)


@pytest.mark.parametrize("long", [0, 4, 8])
def test_columns_on_both_sides_of_long_are_summed(triton_products, monkeypatch, long):
    monkeypatch.setattr(triton_products, "LONG", long)
    monkeypatch.setattr(triton_products, "LONG_PROGRAMS", 3)
    entries = make_entries(list(range(1, 10)), 9, 11, TRITON_DEVICE)
    entries.columns[:] = torch.arange(9)  # the first is in 9 rows, the second in 8, …, the last two in none
    scale, hidden = (torch.randn(*shape, device=TRITON_DEVICE) for shape in ((9,), (9, 24)))
    check_gather_transposed(triton_products, entries, hidden, scale, 11, torch.float32)


def check_sort(triton_products, n: int, most: int, vocab: int) -> None:
    entries = make_entries(some_counts(n, most), most, vocab, TRITON_DEVICE, in_all=7)
    scale = torch.randn(n, device=TRITON_DEVICE)
    rows, values, starts = (t.cpu() for t in triton_products._sort(entries, scale, vocab))
    matrix = dense(entries, scale, vocab).T.float()
    assert starts.tolist() == [0, *(matrix != 0).sum(1).cumsum(0).tolist()]
    assert torch.equal(rows[: starts[-1]].long(), matrix.nonzero()[:, 1])  # nonzero goes row by row
    assert torch.equal(values[: starts[-1]], matrix[matrix != 0])


def test_sort_is_by_vocabulary_then_by_row(triton_products, monkeypatch):
    monkeypatch.setattr(triton_products, "LEAST_ROWS", 3)
    monkeypatch.setattr(triton_products, "BLOCK_B", 16)
    check_sort(triton_products, 40, 37, 53)


@pytest.mark.gpu
def test_sort_keeps_the_order_of_rows_where_programs_run_together(triton_products):
    check_sort(triton_products, 20000, 600, 1031)


@pytest.mark.gpu
def test_products_do_not_wait_for_the_device(triton_products):
    entries = make_entries(some_counts(300, 19), 19, 53, "cuda", in_all=5)
    scale, weight, hidden = (torch.randn(*shape, device="cuda") for shape in ((300,), (53, 40), (300, 40)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        d_hidden = triton_products.gather(entries, weight, scale, torch.bfloat16)
        grads = triton_products.gather_transposed(entries, hidden, scale, 53, torch.bfloat16, True, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.isfinite().all() for t in (d_hidden, *grads))


def test_positions_beyond_int32_are_int64(triton_products, monkeypatch):
    entries = make_entries([4, 7, 0], 7, 11, TRITON_DEVICE)
    scale, hidden = torch.randn(3, device=TRITON_DEVICE), torch.randn(3, 6, device=TRITON_DEVICE)

    def run() -> tuple[Tensor, Tensor]:
        return triton_products.gather_transposed(entries, hidden, scale, 11, torch.float32, True, True)

    assert triton_products._sort(entries, scale, 11)[2].dtype == torch.int32
    expected = run()
    monkeypatch.setattr(triton_products, "MOST_INT32", 20)
    assert triton_products._sort(entries, scale, 11)[2].dtype == torch.int64
    assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))


@pytest.mark.parametrize("strided", ["rows", "columns"])
def test_products_take_strided_inputs(products, device, strided):
    n, vocab = 7, 31
    entries = make_entries(some_counts(n, 9), 9, vocab, device)
    entries = Entries(*(torch.stack([t, t], -1)[..., 0] for t in entries))
    scale = torch.randn(n, 2, device=device)[:, 1]
    if strided == "rows":  # a gap between them
        weight, hidden = (torch.randn(rows, 40, device=device)[:, 8:32] for rows in (vocab, n))
    else:  # a column's numbers lie beside each other
        weight, hidden = (torch.randn(24, rows, device=device).T for rows in (vocab, n))
    check_gather(products, entries, weight, scale, torch.float32)
    check_gather_transposed(products, entries, hidden, scale, vocab, torch.float32)


def test_products_of_a_slice_of_rows_are_a_slice_of_the_products(products, device):
    entries = make_entries(some_counts(7, 9), 9, 31, device)
    scale, weight = torch.randn(7, device=device), torch.randn(31, 24, device=device)
    rows = slice(3, 6)
    whole = products.gather(entries, weight, scale, torch.float32)
    assert torch.equal(products.gather(entries.rows(rows), weight, scale[rows], torch.float32), whole[rows])


def test_products_give_the_same_bits_every_time(products, device):
    n, vocab = 300, 53
    entries = make_entries([1 + t % 19 for t in range(n)], 19, vocab, device, in_all=5)
    scale, weight, hidden = (torch.randn(*shape, device=device) for shape in ((n,), (vocab, 40), (n, 40)))

    def run() -> list[Tensor]:
        d_hidden = products.gather(entries, weight, scale, torch.float32)
        return [d_hidden, *products.gather_transposed(entries, hidden, scale, vocab, torch.float32, True, True)]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_products_take_a_scale_of_any_size(products, device, size):
    entries = make_entries(some_counts(7, 9), 9, 31, device)
    scale, weight, hidden = (torch.randn(*shape, device=device) for shape in ((7,), (31, 24), (7, 24)))
    check_gather(products, entries, weight, size * scale, torch.float32)
    check_gather_transposed(products, entries, hidden, size * scale, 31, torch.float32)


def test_an_infinite_scale_gives_infinities_not_nan(products, device):
    entries = make_entries([1, 0], 9, 3, device)
    scale, weight, hidden = torch.full((2,), torch.inf, device=device), *torch.randn(2, 3, 24, device=device)
    check_gather(products, entries, weight, scale, torch.float32)
    check_gather_transposed(products, entries, hidden[:2], scale, 3, torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # ∞ − ∞ in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["values", "scale", "table"])
def test_what_is_not_finite_stays_in_its_own_outputs(products, device, where, bad):
    n, vocab = 5, 31
    entries = make_entries([0, 9, 4, 9, 3], 9, vocab, device)
    scale, weight, hidden = (torch.randn(*shape, device=device) for shape in ((n,), (vocab, 24), (n, 24)))
    row, column = 2, int(entries.columns[2, 1])
    has_column = (entries.columns == column).any(1)
    own_columns = torch.zeros(vocab, dtype=torch.bool, device=device)
    own_columns[entries.columns[row, :4].long()] = True
    if where == "values":
        entries.values[row, 1] = bad
        own_columns = torch.arange(vocab, device=device) == column
    elif where == "scale":
        scale[row] = bad
    else:
        weight[column] = bad
        hidden[row] = bad
    d_hidden = products.gather(entries, weight, scale, torch.float32)
    d_weight, d_bias = products.gather_transposed(entries, hidden, scale, vocab, torch.float32, True, True)
    own_row = has_column if where == "table" else torch.arange(n, device=device) == row
    assert torch.equal(~d_hidden.isfinite(), own_row.unsqueeze(1).expand(n, 24))
    assert torch.equal(~d_weight.isfinite(), own_columns.unsqueeze(1).expand(vocab, 24))
    assert torch.equal(~d_bias.isfinite(), own_columns & (where != "table"))
