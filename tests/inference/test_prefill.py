"""How rows are cut into pieces, and which ids are taken."""

import numpy as np
import pytest
from support.streams import model_of

from ttt_jax.errors import UserError
from ttt_jax.inference.prefill import capacity_for, check_ids, pieces

C = 8


@pytest.mark.parametrize(
    ("lengths", "positions", "starts"),
    [
        ([20, 9], [0, 16], [True, True]),
        ([20, 9], [0, 5], [False, True]),  # the second row is done when the second piece comes
        ([9, 20], [0, 5], [False, False]),
        ([0, 20], [5, 8], [True, True]),  # a row that reads nothing stands where it likes
        ([20, 20], [1, 9], [False, False]),
    ],
)
def test_a_piece_starts_chunks_when_every_row_that_reads_does(lengths, positions, starts):
    rows = [np.arange(n, dtype=np.int32) for n in lengths]
    found = list(pieces(rows, np.array(positions), 16, C))
    assert [piece.at_chunk_start for piece in found] == starts
    for b, row in enumerate(rows):
        read = np.concatenate([piece.ids_BP[b, : piece.lengths_B[b]] for piece in found])
        np.testing.assert_array_equal(read, row)
        for piece in found:
            assert not piece.ids_BP[b, piece.lengths_B[b] :].any(), "zeros behind a row's end"


def test_caches_are_no_longer_than_the_pieces_of_a_text():
    """Short texts are scored many at once, and a cache of 2,048 slots for each is gigabytes."""
    for tokens in (1, 2, 16, 17, 63, 64, 65, 128, 200):
        rows = [np.zeros(tokens, np.int32)]
        read = sum(piece.ids_BP.shape[1] for piece in pieces(rows, np.zeros(1, int), 64, C))
        room = capacity_for(model_of(), tokens, 64)
        assert room is not None
        assert read <= room
        assert room == (read if tokens <= 64 else -(-tokens // 64) * 64)
    assert capacity_for(model_of(sliding_window=8), 17, 64) is None


def test_ids_of_the_vocabulary_and_no_others():
    assert check_ids([[0, 22]], 23)[0].dtype == np.int32
    for row, bad in (([0, 23], 23), ([-1, 3], -1), ([3, 2**40], 2**40)):
        with pytest.raises(
            UserError, match=f"row 1 holds id {bad}; the model's vocabulary has ids 0 to 22"
        ):
            check_ids([[1], row], 23)
