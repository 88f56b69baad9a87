"""Our tokenizer is `transformers`' own, token for token and character for character, in a tenth of the memory."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import MAKERS
from transformers import AutoTokenizer

from shardwright.errors import InvalidRequestError, ModelError
from shardwright.model.vocabulary import decode_vocabulary
from shardwright.runtime import tokenizer_convert
from shardwright.runtime.stoppable import StoppedError
from shardwright.runtime.tokenizer import LibraryBackend, Tokenizer, WholeBackend
from shardwright.runtime.tokenizer_files import FACTS_FILE

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "Hello, world!",
    " leading, trailing ",
    "two  spaces   three\t\ttabs\r\n\r\nlines\n\n\n",
    "don't we've I'm it's n't ' quoted ' , . ? !",
    "안녕하세요 こんにちは 你好 Größe été",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 ﬁ \U00010348 \u200d\ufeff\x00\x7f",
    "before<|im_end|>after </s> <s> <unk>[SEP] x[CLS]<turn><|endoftext|>",
    "<tool_call> é é <0x41><0xFF> ▁▁ Ġ ##ing </w>",
    "the " * 300,
]
UNLIMITED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=MAKERS)
def pair(request, tmp_path_factory):
    """A tiny tokenizer as `transformers` reads it, and as we do."""
    folder, made = tmp_path_factory.mktemp("original"), tmp_path_factory.mktemp("made")
    MAKERS[request.param](folder)
    tokenizer_convert.convert(folder, made)
    reference = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return reference, Tokenizer.load(folder=made, gguf=None, cache_dir=made / "unused")


def ids_of(reference):
    return st.lists(st.integers(0, len(reference) + 2), max_size=40)


def test_it_needs_the_tokenizers_library_alone(pair):
    _, ours = pair
    assert isinstance(ours._backend, LibraryBackend)


@pytest.mark.parametrize("text", TEXTS)
def test_text_becomes_the_same_tokens(pair, text):
    reference, ours = pair
    assert list(ours.encode(text)) == reference(text)["input_ids"]
    assert list(ours.encode(text, add_special=False)) == reference(text, add_special_tokens=False)["input_ids"]


@UNLIMITED
@given(text=st.text(max_size=60))
def test_any_text_becomes_the_same_tokens_and_the_same_text_again(pair, text):
    reference, ours = pair
    expected = reference(text)["input_ids"]
    assert list(ours.encode(text)) == expected
    assert ours.decode(expected) == reference.decode(expected, skip_special_tokens=True)


@UNLIMITED
@given(data=st.data())
def test_any_tokens_become_the_same_text(pair, data):
    reference, ours = pair
    ids = data.draw(ids_of(reference))
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, keep_special=True) == reference.decode(ids, skip_special_tokens=False)


def test_end_and_special_tokens_are_the_same(pair):
    reference, ours = pair
    assert ours.end_ids == ({reference.eos_token_id} if reference.eos_token_id is not None else set())
    assert {i for i in reference.all_special_ids if i is not None} <= ours.special_ids
    assert ours.vocab_size == len(reference)


@UNLIMITED
@given(data=st.data())
def test_a_stream_gives_the_whole_text_in_pieces_of_whole_characters(pair, data):
    """For any tokens, also those that no text becomes; with and without special tokens."""
    reference, ours = pair
    ids = data.draw(ids_of(reference))
    for keep_special in (False, True):
        stream = ours.stream(keep_special=keep_special)
        pieces = [*(stream.push(token) for token in ids), stream.flush()]
        assert "".join(pieces) == reference.decode(ids, skip_special_tokens=not keep_special)


@UNLIMITED
@given(
    parts=st.lists(
        st.sampled_from([*"ab .,'?nt\n", "n't", " the", "한", "글", "👩", "\u200d", "é", "\u0301"]), max_size=60
    )
)
def test_streamed_text_has_no_half_characters(pair, parts):
    reference, ours = pair
    ids = reference("".join(parts))["input_ids"]
    stream = ours.stream()
    pieces = [stream.push(token) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == reference.decode(ids, skip_special_tokens=True)


def test_a_long_stream_looks_at_a_few_tokens_at_a_time(pair, monkeypatch):
    """Decoding a piece costs the same at the ten-thousandth token as at the tenth."""
    reference, ours = pair
    for token in range(0, min(300, len(reference)), 7):
        looked_at = []
        decode = LibraryBackend.raw_decode
        monkeypatch.setattr(
            LibraryBackend,
            "raw_decode",
            lambda self, ids, decode=decode, seen=looked_at: seen.append(len(ids)) or decode(self, ids),
        )
        stream = ours.stream(keep_special=True)
        pieces = [stream.push(token) for _ in range(200)]
        monkeypatch.undo()
        assert max(looked_at, default=0) <= 6
        assert "".join(pieces) + stream.flush() == reference.decode([token] * 200)


@UNLIMITED
@given(words=st.lists(st.sampled_from(["the", "Don't", "été", "안녕", "👩‍👧", "foxes!", "x = 1", "\n"]), max_size=8))
def test_the_bytes_of_tokens_are_the_bytes_of_their_text(pair, words):
    """But for the space that some decoders leave out at the start, and spaces that others clean away."""
    reference, ours = pair
    ids = ours.encode(" ".join(words), add_special=False)
    joined = b"".join(ours.token_bytes(token) for token in ids if token not in ours.special_ids).decode()
    text = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert joined in {text, f" {text}", f"{text} "}


def test_the_vocabulary_is_every_tokens_bytes(pair):
    reference, ours = pair
    vocabulary = decode_vocabulary(ours.vocabulary())
    assert len(vocabulary.tokens) == len(reference)
    assert vocabulary.special_ids == ours.special_ids
    assert vocabulary.end_id == reference.eos_token_id
    assert vocabulary.tokens == tuple(ours.token_bytes_table())
    for token in ours.special_ids:
        assert vocabulary.tokens[token] == reference.convert_ids_to_tokens(token).encode()
    assert list(vocabulary.tokens) == [ours.token_bytes(token) for token in range(len(reference))]
    assert ours.vocabulary() == ours._make_vocabulary(), "what was kept is what would be made"


def test_ids_that_are_no_tokens_are_refused_with_their_number(pair):
    reference, ours = pair
    for token in (-1, len(reference), 1 << 40):
        with pytest.raises(InvalidRequestError, match=str(token)):
            ours.token_bytes(token)
    with pytest.raises(InvalidRequestError):
        ours.decode([-1])
    with pytest.raises(InvalidRequestError):
        ours.encode("half a pair: \ud83d")


# --- files -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    MAKERS["byte-level"](path)
    return path


def load(folder, tmp_path, **settings):
    return Tokenizer.load(folder=folder, gguf=None, cache_dir=tmp_path / "cache", **settings)


def test_a_folder_is_converted_once_and_again_when_it_changes(folder, tmp_path, monkeypatch):
    first = load(folder, tmp_path)
    kept = list((tmp_path / "cache" / "tokenizers").iterdir())
    assert len(kept) == 1

    started = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or start(*a, **k))
    (folder / "model.safetensors.index.json").write_text("{}")  # no file of a tokenizer
    assert load(folder, tmp_path).encode("Hello") == first.encode("Hello")
    assert started == []

    (folder / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    assert load(folder, tmp_path).chat_template == "new {{ messages[0].content }}"
    assert len(started) == 1


def test_without_a_cache_it_is_converted_each_time(folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load(folder, tmp_path).encode("Hello")


def test_loading_imports_no_torch(folder, tmp_path):
    """Nor does a chat: torch takes a quarter of a gigabyte."""
    load(folder, tmp_path)
    script = (
        "import sys; from pathlib import Path; from shardwright.runtime.tokenizer import Tokenizer\n"
        f"t = Tokenizer.load(folder=Path({str(folder)!r}), gguf=None, cache_dir=Path({str(tmp_path / 'cache')!r}))\n"
        "t.encode_chat([{'role': 'user', 'content': 'Hello'}]); t.vocabulary(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_a_damaged_tokenizer_is_told_with_its_reason(folder, tmp_path):
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelError, match="tokenizer can't be read") as caught:
        load(folder, tmp_path)
    assert str(folder) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_a_damaged_cache_is_told_with_its_place(folder, tmp_path):
    load(folder, tmp_path)
    kept = next((tmp_path / "cache" / "tokenizers").iterdir())
    (kept / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="made anew") as caught:
        load(folder, tmp_path)
    assert str(kept) in str(caught.value)
    shutil.rmtree(kept)
    assert load(folder, tmp_path).encode("Hello")


def test_told_to_stop_it_ends_what_it_started(folder, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        load(folder, tmp_path, stop=stop)
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_a_tokenizer_of_python_is_used_through_transformers(tmp_path):
    """CTRL's has no form that the library reads: it works, and says nothing about bytes."""
    folder, made = tmp_path / "model", tmp_path / "made"
    folder.mkdir()
    words = ["the", "quick", "dog", "do", "g@@", "<unk>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\nd o\ndo g</w>\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}')
    tokenizer_convert.convert(folder, made)
    facts = json.loads((made / FACTS_FILE).read_text())
    assert not facts["alone"]
    assert "Python" in facts["reason"]
    ours = Tokenizer.load(folder=made, gguf=None, cache_dir=tmp_path / "unused")
    assert isinstance(ours._backend, WholeBackend)
    reference = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ids = ours.encode("the dog the")
    assert list(ids) == reference("the dog the")["input_ids"]
    assert ours.decode(ids) == reference.decode(list(ids), skip_special_tokens=True)
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)
    assert ours.vocabulary() == b""


def test_a_class_with_a_way_of_its_own_is_not_taken_for_the_librarys(tmp_path, monkeypatch):
    folder, made = tmp_path / "model", tmp_path / "made"
    folder.mkdir()
    MAKERS["byte-level"](folder)
    kind = type(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    own = type("OwnWay", (kind,), {"_decode": lambda *_, **__: "x"})
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: own.from_pretrained(str(folder)))
    tokenizer_convert.convert(folder, made)
    assert json.loads((Path(made) / FACTS_FILE).read_text())["reason"] == "OwnWay has its own _decode"
