"""How rows are cut into chunks: pure Python, no tensors.

A chunk is a run of pairs whose loss becomes known together, made of pieces: the row ranges on which the gradient GEMMs
run. Either it holds several whole pairs in one piece, or it is one pair too long for that, each of its two sequences
cut into pieces. No piece has more than `max_rows` rows, so memory is bounded at any length.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

# Rows of a tile of logits. 384 fill a GEMM: three times the height of its tiles, and twice the operations a byte of
# weight that keep the matrix units of an H200 busy (NOTES.md of the benchmarks). Where the vocabulary is small, so few
# are done before the host has launched the next tile: then as many as have _TILE_BYTES.
_TILE_ROWS, _MOST_TILE_ROWS, _TILE_BYTES = 384, 1536, 200_000_000
_GRAD_ROWS = 3072  # of gradient in a piece: a pass over d_weight is then 8% of its GEMMs on an H200
_LEAST_BYTES = 960 * 2**20


class Piece(NamedTuple):
    start: int  # rows start … end
    end: int
    sequence: int  # the sequence it ends in


class Chunk(NamedTuple):
    first_pair: int  # pairs first_pair … last_pair - 1
    last_pair: int
    pieces: tuple[Piece, ...]


def plan_chunks(cu_seqlens: Sequence[int], max_rows: int, rows: Sequence[int] | None = None) -> list[Chunk]:
    """Chunks that cover every row once, pairs of more than `max_rows` rows first.

    Long pairs come first because the first of them may gather its unscaled weight gradient in the still empty
    d_weight: one pair of any length then needs no second buffer of V × H.

    rows: of each pair, at least those that cu_seqlens says: what decides. Where ranks share sequences, the most that
    one of them has: all then plan the same chunks, each with its own pieces.
    """
    if rows is None:
        rows = [end - start for start, end in itertools.pairwise(cu_seqlens[::2])]
    long = [Chunk(p, p + 1, _cut_pair(cu_seqlens, p, max_rows)) for p, count in enumerate(rows) if count > max_rows]
    whole: list[Chunk] = []
    first = total = 0
    for p, count in enumerate([*rows, max_rows + 1]):
        # A run of whole pairs ends at the end, before a long pair, and where the next pair does not fit any more.
        if total + count > max_rows:
            if p > first:
                start, end = cu_seqlens[2 * first], cu_seqlens[2 * p]
                whole.append(Chunk(first, p, (Piece(start, end, 2 * p - 1),)))
            first, total = (p + 1, 0) if count > max_rows else (p, 0)
        total += count if count <= max_rows else 0
    return long + whole


def _cut_pair(cu_seqlens: Sequence[int], pair: int, max_rows: int) -> tuple[Piece, ...]:
    pieces = []
    for sequence in (2 * pair, 2 * pair + 1):
        start, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
        rows, count = end - start, -(-(end - start) // max_rows)
        # Pieces of equal size: a small last one would pay a whole pass over d_weight for a few rows.
        pieces += [Piece(start + rows * i // count, start + rows * (i + 1) // count, sequence) for i in range(count)]
    return tuple(pieces)


def rows_for(chunk_bytes: int, vocab: int, logit_bytes: int, grad_bytes: int | None) -> tuple[int, int]:
    """(rows of gradient per piece, rows of logits per tile) whose buffers together fit chunk_bytes.

    logit_bytes, grad_bytes: bytes of one number (None: no gradient wanted). With equal sizes the gradient overwrites
    the logits, one buffer serves both. Otherwise the gradient rows get three quarters of the bytes or more: every
    piece costs one pass over d_weight, however few rows it has, while the logits only need rows enough to fill a GEMM.
    """
    if grad_bytes in (None, logit_bytes):
        rows = max(1, chunk_bytes // (vocab * logit_bytes))
        return rows, rows
    tile = max(1, min(_tile_rows(vocab, logit_bytes), chunk_bytes // 4 // (vocab * logit_bytes)))
    piece = max(1, (chunk_bytes - tile * vocab * logit_bytes) // (vocab * grad_bytes))
    return piece, min(piece, tile)


def accelerator_bytes(vocab: int) -> int:
    """chunk_bytes where nobody gives them: 384 rows of fp32 logits and 3,072 of bf16 gradient, whatever the vocabulary.

    960 MiB up to 128k entries, 1.9 GiB for 256k.
    """
    return max(_LEAST_BYTES, vocab * (4 * _TILE_ROWS + 2 * _GRAD_ROWS))


def _tile_rows(vocab: int, logit_bytes: int) -> int:
    rows = _TILE_BYTES // (vocab * logit_bytes) // 128 * 128
    return max(_TILE_ROWS, min(_MOST_TILE_ROWS, rows))
