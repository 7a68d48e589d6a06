"""Which rows are held out: by the splits that a source has, or by a hash of the prompt."""

import hashlib
import json
import os
from collections.abc import Sequence

from alignjax.config import Data
from alignjax.data.conversations import is_answer
from alignjax.data.formats import in_words
from alignjax.errors import UserError

# Columns that tell rows apart which have no prompt, the first that holds something.
_ANSWERS = ("chosen", "text", "completion", "output", "responses", "completions")


def choose_split(name: str, splits: Sequence[str], data: Data, held_out: bool) -> tuple[str, bool]:
    """The split to read of a source that has its own ("": none), and whether to take all of it.

    Where no split is held out, `data.eval_fraction` divides the training split instead.
    """
    divided = may_divide(data) and data.eval_split not in splits
    wanted = data.eval_split if held_out and not divided else data.split
    if wanted in splits:
        return wanted, not divided
    if len(splits) == 1 and held_out and not must_exist(data, held_out):
        return "", True
    raise no_split(name, wanted, splits, held_out and not divided)


def may_divide(data: Data) -> bool:
    """Whether a share of the training rows is held out where no split is."""
    return data.eval_fraction > 0 and not data.eval_path


def must_exist(data: Data, held_out: bool) -> bool:
    """Whether a missing split is an error: a run without held-out rows is none."""
    return not held_out or bool(data.eval_path) or data.eval_split != Data.eval_split


def no_split(name: str, wanted: str, splits: Sequence[str], held_out: bool) -> UserError:
    key = "data.eval_split" if held_out else "data.split"
    listed = ", ".join(map(in_words, splits)) or "none"
    listed = f"there {'is' if len(splits) == 1 else 'are'} {listed}"
    return UserError(f"{name}: there is no split {in_words(wanted)}; {listed}: set {key}.")


def hash01(row: dict) -> float:
    """A number in [0, 1) that the row's prompt decides: rows of one prompt fall together."""
    own = row.get("prompt") or row.get("messages") or row.get("conversations") or _instruction(row)
    prompt = own or next((row[name] for name in _ANSWERS if row.get(name)), None)
    if isinstance(prompt, list):
        prompt = [message for message in prompt if not is_answer(message)][:2]
    elif not own and isinstance(prompt, str) and prompt == row.get("chosen"):
        prompt = os.path.commonprefix([prompt, str(row.get("rejected"))]) or prompt
    text = json.dumps(prompt, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _instruction(row: dict) -> object:
    """The first question of an Alpaca row: later turns of one conversation belong to it."""
    match row.get("history"):
        case [[str(question), *_], *_]:
            return question
    asked, text = row.get("instruction"), row.get("input")
    return f"{asked}\n{text}" if asked and text else asked or text
