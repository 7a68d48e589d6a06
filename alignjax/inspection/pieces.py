"""Single tokens as text that can be read: nothing is invisible, nothing acts on a screen.

Joined, the texts of a sequence are what it decodes to, with marks for what cannot be seen.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Callable, Iterable

_MARKS = {"\n": "⏎\n", "\t": "⇥\t", "\x7f": "␡"}  # a line break is shown, and then made
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's tokens of one byte
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")  # Unicode categories


def token_reader(tokenizer) -> Callable[[Iterable[int]], list[str]]:
    """A function from a sequence's ids to the text of each token.

    A token that ends within a character shows the bytes it holds of it, as in ‹E2 9C›; the
    character stands in the token that completes it.
    """
    raw_of = _bytes_reader(tokenizer)

    def read(ids: Iterable[int]) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = []
        for token in ids:
            raw = raw_of(int(token))
            text = visible(decoder.decode(raw))
            pending = decoder.getstate()[0][-len(raw) :] if raw else b""
            texts.append(text + (f"‹{pending.hex(' ').upper()}›" if pending else ""))
        return texts

    return read


def visible(text: str) -> str:
    """Text whose control characters, odd spaces and invisible characters are spelled out."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    if character < " ":
        return chr(0x2400 + ord(character))  # Unicode's picture of it
    if character != " " and unicodedata.category(character) in _UNSEEN:
        return f"‹U+{ord(character):04X}›"
    return character


def _bytes_reader(tokenizer) -> Callable[[int], bytes]:
    """A function from a token's id to the bytes that it stands for."""
    added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
    decoder = tokenizer.backend_tokenizer.decoder
    byte_level = decoder is not None and "ByteLevel" in _types(json.loads(decoder.__getstate__()))
    alphabet = _byte_alphabet()

    def raw_of(token: int) -> bytes:
        if token in added:
            return added[token]
        piece = tokenizer.convert_ids_to_tokens(token)
        if byte_level:
            return b"".join(alphabet.get(character) or character.encode() for character in piece)
        found = _BYTE.fullmatch(piece)
        return bytes.fromhex(found[1]) if found else piece.replace("▁", " ").encode()

    return raw_of


def _types(decoder: dict) -> list[str]:
    """The type of a decoder of the tokenizers package, and those of its parts."""
    return [decoder["type"]] + [t for part in decoder.get("decoders", []) for t in _types(part)]


def _byte_alphabet() -> dict[str, bytes]:
    """The character that stands for each byte in byte-level BPE, as GPT-2 laid it down."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    own += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): bytes([byte]) for byte in own} | {
        chr(256 + i): bytes([byte]) for i, byte in enumerate(others)
    }
