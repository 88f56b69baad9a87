"""A tokenizer whose tokens are the bytes, with an end token and one special mark: every character border can be cut."""

import codecs

VOCABULARY = 258
END = 256
MARK = 257
_NAMES = {END: "<end>", MARK: "<mark>"}


class ByteCodec:
    """Token id = byte."""

    def encode(self, text):
        return tuple(text.encode())

    def encode_chat(self, messages, *, tools=(), options=None, continue_last=False):
        return self.encode("".join(message["content"] for message in messages))

    def decode(self, tokens):
        return bytes(token for token in tokens if token not in _NAMES).decode(errors="replace")

    def token_bytes(self, token_id):
        return _NAMES[token_id].encode() if token_id in _NAMES else bytes([token_id])

    def stream(self, *, keep_special=False):
        return _Stream(keep_special)


class _Stream:
    def __init__(self, keep_special):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._keep_special = keep_special

    def push(self, token):
        if token in _NAMES:
            return _NAMES[token] if self._keep_special else ""
        return self._decoder.decode(bytes([token]))

    def flush(self):
        return self._decoder.decode(b"", final=True)
