"""A vocabulary's blob gives back what it was made of, and says so when it can't."""

import numpy as np
import pytest

from shardwright.errors import CheckpointError
from shardwright.model.vocabulary import Vocabulary, decode_vocabulary, encode_vocabulary

TOKENS = (b"", b"a", bytes(range(256)), "größer".encode(), b" " * 1024, b"</s>", b"\xff")
BLOB = encode_vocabulary(TOKENS, special_ids=[5, 0, 5], end_id=5)


@pytest.mark.parametrize("end_id", [None, 0, 6])
def test_what_was_encoded_comes_back(end_id):
    blob = encode_vocabulary(TOKENS, special_ids={6, 2}, end_id=end_id)
    expected = Vocabulary(tokens=TOKENS, special_ids=frozenset({2, 6}), end_id=end_id)
    assert decode_vocabulary(blob) == decode_vocabulary(memoryview(blob)) == expected


def test_a_large_vocabulary_stays_below_three_megabytes():
    """262,144 tokens of the lengths that byte-pair encodings have: 6.5 bytes in the mean."""
    draw = np.random.default_rng(3)
    tokens = [draw.bytes(length) for length in draw.integers(1, 13, size=262_144)]
    blob = encode_vocabulary(tokens, special_ids=range(500), end_id=1)
    assert len(blob) < 3_000_000
    assert decode_vocabulary(blob).tokens == tuple(tokens)


@pytest.mark.parametrize("cut", range(0, len(BLOB), 7))
def test_a_truncated_blob_is_refused(cut):
    with pytest.raises(CheckpointError, match="vocabulary"):
        decode_vocabulary(BLOB[:cut])


@pytest.mark.parametrize("place", range(0, len(BLOB), 5))
def test_a_changed_byte_is_noticed_wherever_it_lies(place):
    damaged = bytearray(BLOB)
    damaged[place] ^= 0x40
    with pytest.raises(CheckpointError):
        decode_vocabulary(bytes(damaged))


def test_another_version_is_refused_by_its_number():
    newer = BLOB[:8] + (9).to_bytes(4, "little") + BLOB[12:]
    with pytest.raises(CheckpointError, match="version 9"):
        decode_vocabulary(newer)


@pytest.mark.parametrize(
    ("tokens", "special", "end", "message"),
    [
        ([], [], None, "0 tokens"),
        ([b"a"], [1], None, "special token 1"),
        ([b"a"], [], 7, "end token 7"),
        ([b"a" * 65_536], [], None, "65536 bytes"),
    ],
)
def test_what_has_no_blob_is_refused(tokens, special, end, message):
    with pytest.raises(CheckpointError, match=message):
        encode_vocabulary(tokens, special_ids=special, end_id=end)


def test_a_head_with_fewer_rows_cuts_the_vocabulary():
    whole = decode_vocabulary(BLOB)
    assert whole.first(7) is whole
    assert whole.first(3) == Vocabulary(tokens=TOKENS[:3], special_ids=frozenset({0}), end_id=None)
    assert whole.first(6).end_id == 5
