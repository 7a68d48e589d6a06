"""Rows in short, and the tokens on disk that are made of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from alignjax.config import Data
from alignjax.data import tokens
from alignjax.data.tokenset import TokenSet


def write(file: Path, data: list[dict], blank: int = 0) -> str:
    file.write_text("\n" * blank + "".join(json.dumps(row) + "\n" for row in data))
    return str(file)


def sft_row(prompt: str, completion: str, **more) -> dict:
    return {"prompt": prompt, "completion": completion} | more


def pair_row(prompt: str, chosen: str, rejected: str, **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def sequences(data: TokenSet) -> list[tuple[list[int], list[bool]]]:
    return [
        (data.tokens[a:b].tolist(), data.trained[a:b].tolist())
        for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)
    ]


PAIRS = [
    pair_row("why", "because", "no"),
    pair_row("how", "so", "thus it is"),
    pair_row("when", "now", "then"),
]


def make(path, tokenizer, tokenizer_dir, cache, stage="dpo", held_out=False, **settings):
    data = Data(path=path, **settings)
    return tokens.token_set(data, stage, held_out, tokenizer, tokenizer_dir, cache)


def tokenizer_text(data: TokenSet, tokenizer, sequence: int) -> str:
    return tokenizer.decode(sequences(data)[sequence][0])


def same(one: TokenSet, other: TokenSet) -> bool:
    """Whether all is equal but where the bad rows are listed."""
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(TokenSet)
        if field.name != "bad_rows_file"
    )
