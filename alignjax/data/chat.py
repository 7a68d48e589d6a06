"""Conversations -> token ids and the mask of trained tokens, many conversations at a time.

Which tokens are trained follows from spans of the rendered text, never from token ids: the text of
a conversation is rendered up to a turn's header and through its end; tokens inside are its own.
"""

from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from alignjax import templates
from alignjax.data.columns import Side
from alignjax.errors import UserError

_MARK = "\x02the answer\x03"  # stands for an answer while the text around it is found

Encoded = tuple[np.ndarray, np.ndarray]  # int32 ids; bool, whether each is trained


def load_tokenizer(directory: Path, chat_template: str = ""):
    """A model directory's fast tokenizer, with a chat template by name or file in place of its own.

    Raises UserError where there is none, or `templates.choose` refuses the template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory,
            trust_remote_code=False,
            mistral_format=False,  # else a tekken.json is read by mistral-common, if installed
        )
    except (ValueError, OSError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{directory}: its tokenizer does not load ({first}).") from None
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: there is no tokenizer.json; a fast tokenizer is needed.")
    if chat_template:
        tokenizer.chat_template = templates.choose(tokenizer, chat_template)
    # Both can stand in tokenizer.json; what is too long, and where padding goes, is decided here.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def render(tokenizer, messages: list[dict], generate: bool = False) -> str:
    """A conversation as the text the model sees; `generate` adds the next answer's header."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)


def end_of_turn_id(tokenizer) -> int | None:
    """The token that ends an answer under the chat template; None if there is no such token."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    tail = render(tokenizer, messages).partition(_MARK)[2]
    ids = tokenizer.encode(tail[: _end_of_turn(tokenizer, tail)], add_special_tokens=False)
    return ids[-1] if ids else None


def encode_sides(
    tokenizer, sides: list[tuple[Side, str]], train_on: str
) -> list[Encoded | UserError]:
    """Token ids of conversations and which are trained; a ValueError in the place of a bad one.

    Each side comes with its row's place. Trained are the assistant turns of the answer (`train_on`
    "all", or only the "last"), each from behind its header through its end-of-turn token. Plain
    text is trained from the prompt's end through an EOS token. With `train_on` "everything" all
    tokens are. Raises UserError itself where the tokenizer lacks what every side needs.
    """
    found: dict[int, Encoded | UserError] = {}
    plain = [i for i, (side, _) in enumerate(sides) if isinstance(side.answer, str)]
    chats = [i for i, (side, _) in enumerate(sides) if not isinstance(side.answer, str)]
    if plain:
        found |= zip(plain, _encode_plain(tokenizer, [sides[i] for i in plain]), strict=True)
    if chats:
        encoded = _encode_chats(tokenizer, [sides[i] for i in chats], train_on)
        found |= zip(chats, encoded, strict=True)
    if train_on == "everything":
        for i, side in found.items():
            if sides[i][0].kept_out:
                found[i] = UserError(
                    f"{sides[i][1]}: `weight` or `train` of its messages keeps an answer out of "
                    "training, and data.train_on=everything trains all; set data.train_on=all."
                )
            elif not isinstance(side, UserError):
                side[1][:] = True
    return [found[i] for i in range(len(sides))]


def _encode(
    tokenizer, texts: list[str | UserError], wheres: list[str], special: bool
) -> list[tokenizers.Encoding | UserError]:
    """Encodes the texts together, on all cores; `special` adds the tokenizer's own BOS or EOS."""
    found: list[tokenizers.Encoding | UserError | None] = [None] * len(texts)
    for i, (text, where) in enumerate(zip(texts, wheres, strict=True)):
        found[i] = text if isinstance(text, UserError) else _not_unicode(text, where)
    good = [i for i, error in enumerate(found) if error is None]
    encodings = tokenizer.backend_tokenizer.encode_batch(
        [texts[i] for i in good], add_special_tokens=special
    )
    for i, encoding in zip(good, encodings, strict=True):
        found[i] = encoding
    return found


def _not_unicode(text: str, where: str) -> ValueError | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return UserError(
            f"{where}: the text is not valid Unicode (half a surrogate pair at character "
            f"{error.start}); remove the character."
        )
    return None


# Plain text


def _encode_plain(tokenizer, sides: list[tuple[Side, str]]) -> list[Encoded | UserError]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"{sides[0][1]}: the tokenizer has no EOS token, which ends plain text.")
    texts = [side.prompt + side.answer for side, _ in sides]
    encodings = _encode(tokenizer, texts, [where for _, where in sides], special=True)
    return [
        found if isinstance(found, UserError) else _mask_plain(found, len(side.prompt), eos)
        for found, (side, _) in zip(encodings, sides, strict=True)
    ]


def _mask_plain(encoding, prompt: int, eos: int) -> Encoded:
    """Trained is what ends behind the prompt's characters, and the EOS token."""
    ids = encoding.ids
    own = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    # A token that holds the prompt's last space and the answer's first word is the answer's.
    first = bisect_right(own, prompt, key=lambda i: encoding.token_to_chars(i)[1])
    if ids[-1:] != [eos]:
        ids.append(eos)
    mask = np.zeros(len(ids), bool)
    mask[own[first:]] = True
    mask[-1] = True
    return np.array(ids, np.int32), mask


# Conversations


class _Around(NamedTuple):
    """What a template puts around an answer."""

    lead: str  # between the header and the answer
    tail: str
    end: int  # characters of the tail that end the turn


def _encode_chats(
    tokenizer, sides: list[tuple[Side, str]], train_on: str
) -> list[Encoded | UserError]:
    if not tokenizer.chat_template:
        raise UserError(
            f"{sides[0][1]}: the model has no chat template; name one with "
            "--model.chat_template=NAME (or a file), or set data.strings=plain for plain text."
        )
    texts: list[str | UserError] = []
    spans: list[list[tuple[int, int]]] = []
    around = None
    for side, where in sides:
        messages = [*side.prompt, *side.answer]
        turns = [
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and i >= len(side.prompt) and i not in side.kept_out
        ]
        turns = turns[-1:] if train_on == "last" else turns
        try:
            text, found, around = _spans(tokenizer, messages, turns, where, around)
        except ValueError as error:
            text, found = error, []
        texts.append(text)
        spans.append(found)
    encodings = _encode(tokenizer, texts, [where for _, where in sides], special=False)
    return [
        encoding if isinstance(encoding, UserError) else _mask_spans(encoding, trained)
        for encoding, trained in zip(encodings, spans, strict=True)
    ]


def _mask_spans(encoding, spans: list[tuple[int, int]]) -> Encoded:
    """Trained is what lies within a span. From token to token, characters never go backwards."""
    tokens = range(len(encoding))
    mask = np.zeros(len(tokens), bool)
    for start, end in spans:
        first = bisect_left(tokens, start, key=lambda i: encoding.token_to_chars(i)[0])
        behind = bisect_right(tokens, end, key=lambda i: encoding.token_to_chars(i)[1])
        mask[first:behind] = True
    return np.array(encoding.ids, np.int32), mask


def _spans(
    tokenizer, messages: list[dict], turns: list[int], where: str, around: _Around | None
) -> tuple[str, list[tuple[int, int]], _Around | None]:
    """A conversation's text, and where its trained turns begin and end, in characters.

    Takes and returns what the template put around the answer before.
    """
    from jinja2 import TemplateError

    try:
        text = render(tokenizer, messages)
        spans = []
        for i in turns:
            header = render(tokenizer, messages[:i], generate=True)
            end = around and _known_end(text, header, messages[i]["content"], around)
            if not end:
                end, around = _find_end(tokenizer, text, header, messages[: i + 1], where)
            spans.append((len(header), end))
        return text, spans, around
    except TemplateError as error:
        raise UserError(f"{where}: the chat template refuses this row ({error}).") from None


def _known_end(text: str, header: str, answer: str, around: _Around) -> int:
    """Where a turn ends, if the text has the answer, as it is or stripped, in what was around the
    one before; else 0. This saves two renders of three."""
    for words in (answer, answer.strip()):
        if text.startswith(header + around.lead + words + around.tail):
            return len(header) + len(around.lead) + len(words) + around.end
    return 0


def _find_end(
    tokenizer, text: str, header: str, messages: list[dict], where: str
) -> tuple[int, _Around | None]:
    """Where the turn of the last message ends, and what is around its answer.

    The latter is None where the answer or the end of its turn is not to be seen in the text.
    """
    through = render(tokenizer, messages)
    marked = render(tokenizer, [*messages[:-1], {**messages[-1], "content": _MARK}])
    if not (text.startswith(through) and through.startswith(header)):
        raise UserError(
            f"{where}: the chat template renders turn {len(messages)} otherwise when turns follow "
            "it, so its tokens cannot be told apart; set data.train_on=last, or name another "
            "--model.chat_template."
        )
    before, _, tail = marked.partition(_MARK)
    end = _end_of_turn(tokenizer, tail)
    around = _Around(before.removeprefix(header), tail, end) if end else None
    return len(through) - len(tail) + end, around


def _end_of_turn(tokenizer, tail: str) -> int:
    """Characters behind an answer that end its turn: through the first special token.

    An added token that is not marked as special counts where no special one follows: of those there
    can be thousands, runs of newlines among them.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    for tokens in (tokenizer.all_special_tokens + special, [token.content for token in added]):
        ends = [tail.index(token) + len(token) for token in tokens if token in tail]
        if ends:
            return min(ends)
    return 0


def special_ids(tokenizer) -> list[int]:
    """Tokens that are no text: begins and ends of texts and turns, and what else is marked so."""
    added = tokenizer.added_tokens_decoder.items()
    marked = {number for number, token in added if token.special}
    return sorted(marked | set(tokenizer.all_special_ids))
