import io

import pytest

from shardwright.cli.prompts import Prompt, Split, parse_ids, read_prompts
from shardwright.errors import ConfigError, InvalidRequestError


class Terminal(io.StringIO):
    def isatty(self):
        return True


def read(argument=None, file=None, ids=(), split=Split.LINE, stdin=""):
    source = stdin if isinstance(stdin, io.StringIO) else io.StringIO(stdin)
    return read_prompts(argument=argument, file=file, ids=ids, split=split, stdin=source)


TEXT = "one\n\n  two  \nthree\r\n\n\nfour"


def test_an_argument_is_one_prompt_as_it_stands():
    assert read("Hello,\nyou ", stdin="not read") == [Prompt(text="Hello,\nyou ")]


def test_lines_are_prompts_and_blank_lines_are_none():
    assert [p.text for p in read(stdin=TEXT)] == ["one", "two", "three", "four"]


def test_blank_lines_can_separate_prompts_of_several_lines():
    assert [p.text for p in read(stdin=TEXT, split=Split.BLANK)] == ["one", "two  \nthree", "four"]


def test_a_whole_input_can_be_one_prompt():
    assert [p.text for p in read(stdin="a\n\nb\n", split=Split.NONE)] == ["a\n\nb"]


def test_a_dash_reads_standard_input():
    assert read("-", stdin="from there") == [Prompt(text="from there")]


def test_a_file_is_read_with_or_without_a_byte_order_mark(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert [p.text for p in read(file=tmp_path / "p.txt")] == ["one", "two"]


def test_token_ids_are_prompts_in_their_order():
    assert read(ids=["5,17,3", " 1 , 2"]) == [Prompt(token_ids=(5, 17, 3)), Prompt(token_ids=(1, 2))]


@pytest.mark.parametrize("text", ["", "5,,3", "5,x", "-1", "1.5", "٣", "5 3"])
def test_what_is_no_token_id_is_named(text):
    with pytest.raises(InvalidRequestError, match="is not a token id; write them as in 5,17,3"):
        parse_ids(text)


def test_no_prompt_in_a_terminal_is_an_error_that_teaches():
    with pytest.raises(ConfigError, match='as in: shardwright generate "Hello"'):
        read(stdin=Terminal())


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_refused(text):
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        read(text)


@pytest.mark.parametrize("split", list(Split))
def test_an_input_without_a_prompt_is_refused(split):
    with pytest.raises(InvalidRequestError, match="standard input holds no prompt"):
        read(stdin=" \n\n", split=split)


def test_two_sources_are_one_too_many(tmp_path):
    with pytest.raises(ConfigError, match="a prompt and --prompt-ids were given"):
        read("Hello", ids=["1"])
    with pytest.raises(ConfigError, match="a prompt and --file and --prompt-ids were given"):
        read("Hello", ids=["1"], file=tmp_path / "x")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.txt: can't be read: No such file"):
        read(file=tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        read(file=tmp_path / "binary")


def test_a_title_is_short_and_on_one_line():
    assert Prompt(text="a\nb").title == "a b"
    assert Prompt(token_ids=(5, 17)).title == "5,17"
    assert len(Prompt(text="word " * 40).title) == 60
