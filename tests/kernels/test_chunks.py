"""How rows are cut: properties of every plan, and the cases one would get wrong."""

import itertools
import random

import pytest

from hdpo_kernels.chunks import Chunk, Piece, accelerator_bytes, plan_chunks, rows_for


def plan(lengths, max_rows):
    cu_seqlens = [0, *itertools.accumulate(lengths)]
    return cu_seqlens, plan_chunks(cu_seqlens, max_rows)


def check_plan(lengths, max_rows):
    cu_seqlens, chunks = plan(lengths, max_rows)
    rows_of_pair = [a + b for a, b in zip(lengths[0::2], lengths[1::2], strict=True)]

    pairs = [p for chunk in chunks for p in range(chunk.first_pair, chunk.last_pair)]
    assert sorted(pairs) == list(range(len(rows_of_pair))), "every pair once"
    covered = [row for chunk in chunks for piece in chunk.pieces for row in range(piece.start, piece.end)]
    assert sorted(covered) == list(range(cu_seqlens[-1])), "every row once"
    for chunk in chunks:
        assert chunk.pieces[0].start == cu_seqlens[2 * chunk.first_pair]
        assert chunk.pieces[-1].end == cu_seqlens[2 * chunk.last_pair]
        for piece in chunk.pieces:
            assert 0 <= piece.end - piece.start <= max_rows, "no piece is larger than allowed"
        for before, after in itertools.pairwise(chunk.pieces):
            assert before.end == after.start, "pieces are in order"
        if len(chunk.pieces) == 1:
            continue
        assert chunk.last_pair == chunk.first_pair + 1, "only a long pair is in pieces"
        assert rows_of_pair[chunk.first_pair] > max_rows
        for piece in chunk.pieces:
            assert cu_seqlens[piece.sequence] <= piece.start < piece.end <= cu_seqlens[piece.sequence + 1]
        for sequence in (2 * chunk.first_pair, 2 * chunk.first_pair + 1):
            sizes = [piece.end - piece.start for piece in chunk.pieces if piece.sequence == sequence]
            assert not sizes or max(sizes) - min(sizes) <= 1, "pieces of one sequence are of equal size"
            assert len(sizes) == -(-lengths[sequence] // max_rows), "and no more of them than needed"
    in_pieces = [len(chunk.pieces) > 1 for chunk in chunks]
    assert in_pieces == sorted(in_pieces, reverse=True), "long pairs first"
    assert sum(in_pieces) == sum(rows > max_rows for rows in rows_of_pair)


def test_plan_chunks_properties_hold_for_random_lengths():
    rng = random.Random(0)
    for _ in range(500):
        longest = rng.choice([1, 3, 10, 40])
        lengths = [rng.randint(0, longest) for _ in range(2 * rng.randint(0, 8))]
        check_plan(lengths, rng.choice([1, 2, 7, 16, 1000]))


@pytest.mark.parametrize(
    ("lengths", "max_rows"),
    [([], 4), ([0, 0], 1), ([0, 9], 4), ([9, 0], 4), ([0, 5, 5, 0], 4), ([2, 2, 0, 0, 2, 2], 4), ([4, 4], 4),
     ([2**20, 1], 3000)],
)  # fmt: skip
def test_plan_chunks_properties_hold_at_the_edges(lengths, max_rows):
    check_plan(lengths, max_rows)


def test_plan_chunks_keeps_whole_pairs_together():
    _, chunks = plan([1, 1, 2, 1, 3, 1], 5)
    assert chunks == [Chunk(0, 2, (Piece(0, 5, 3),)), Chunk(2, 3, (Piece(5, 9, 5),))]


def test_plan_chunks_cuts_a_long_pair_within_its_sequences_and_puts_it_first():
    _, chunks = plan([1, 1, 5, 2, 1, 1], 4)
    assert chunks == [
        Chunk(1, 2, (Piece(2, 4, 2), Piece(4, 7, 2), Piece(7, 9, 3))),
        Chunk(0, 1, (Piece(0, 2, 1),)),
        Chunk(2, 3, (Piece(9, 11, 5),)),
    ]


def test_plan_chunks_of_nothing_is_nothing():
    assert plan_chunks([0], 10) == []


def test_rows_for_fits_the_budget():
    for vocab, budget in itertools.product((100, 32003, 151936), (1, 10**6, 10**9)):
        for logit_bytes, grad_bytes in ((4, 2), (4, 4), (8, 8), (4, None)):
            piece, tile = rows_for(budget, vocab, logit_bytes, grad_bytes)
            assert 1 <= tile <= piece
            shared = grad_bytes in (None, logit_bytes)
            held = tile * vocab * logit_bytes + (0 if shared else piece * vocab * grad_bytes)
            if shared:
                assert held <= max(budget, vocab * logit_bytes)
                assert piece == tile, "one buffer serves both"
            else:  # a row of each is the least
                assert held <= max(budget, vocab * (logit_bytes + grad_bytes))
            if not shared and budget > 100 * vocab:
                assert held > 0.9 * budget, "and uses it"
                assert piece > tile, "mostly for gradient rows"


def test_rows_for_gives_gradient_rows_what_a_tile_of_logits_does_not_need():
    piece, tile = rows_for(960 * 2**20, 128256, 4, 2)
    assert tile == 384 and piece == 3156, "three pairs of 1,024 rows"


@pytest.mark.parametrize(
    ("vocab", "rows", "mib"),
    [(32000, 1536, 960), (50304, 896, 960), (128256, 384, 960), (151936, 384, 1113), (256000, 384, 1875)],
)
def test_accelerator_bytes_are_tiles_that_outlast_a_launch_and_3072_rows_of_gradient(vocab, rows, mib):
    chunk_bytes = accelerator_bytes(vocab)
    piece, tile = rows_for(chunk_bytes, vocab, 4, 2)
    assert tile == rows and piece >= 3072 and round(chunk_bytes / 2**20) == mib
