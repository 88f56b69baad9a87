"""Stop strings are found wherever the pieces' borders lie, and no part of one is ever shown."""

from hypothesis import given
from hypothesis import strategies as st

from shardwright.runtime.stop_strings import StopFinder

LETTERS = "ab"  # few, so that stop strings overlap with themselves and each other
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)


def read(pieces, stops):
    """Text shown piece by piece, and the stop string."""
    finder = StopFinder(stops)
    shown = []
    for piece in pieces:
        text, stop = finder.push(piece)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, finder.flush()], None


def first_stop(text, stops):
    """By definition: the first character at which a stop string is complete, and the longest that ends there."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(pieces=st.lists(st.text(LETTERS, max_size=6), max_size=12), stops=STOPS)
def test_the_text_ends_where_the_first_stop_string_is_complete_however_it_comes(pieces, stops):
    shown, stop = read(pieces, stops)
    assert ("".join(shown), stop) == first_stop("".join(pieces), stops)


@given(pieces=st.lists(st.text(LETTERS, max_size=6), max_size=12), stops=STOPS)
def test_exactly_what_may_begin_a_stop_string_is_held_back(pieces, stops):
    finder = StopFinder(stops)
    text, shown = "", ""
    for piece in pieces:
        text += piece
        more, stop = finder.push(piece)
        shown += more
        if stop is not None:
            return
        beginnings = [stop[:length] for stop in stops for length in range(len(stop))]
        longest = max(len(beginning) for beginning in beginnings if text.endswith(beginning))
        assert shown == text[: len(text) - longest]


def test_pieces_go_through_as_they_come_where_no_stop_string_begins():
    shown, stop = read(["Hello", ", wor", "ld\n", "!", "\n", "\nUser"], ["\n\n"])
    assert shown == ["Hello", ", wor", "ld", "\n!", "", ""]
    assert stop == "\n\n"
