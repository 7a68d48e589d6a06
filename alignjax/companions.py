"""What lies beside a trained model's weights and is not its source's: template, ends, padding."""

import json
from typing import Any

from alignjax.data.chat import end_of_turn_id
from alignjax.files import read_json
from alignjax.models.families import Generation
from alignjax.weights.source import Source, decoder_config

_GENERATION = "generation_config.json"


def of_trained(source: Source, tokenizer, chat_template: str) -> dict[str, str]:
    """The files without which the model is not used as it was trained, name -> text.

    A chat template that was given. generation_config.json, where the source's does not end an
    answer with the token that the template ends it with. A reward model's tokenizer, where it pads
    with another token than config.json says: transformers takes the reward before those.
    """
    files = {}
    if chat_template:
        files["chat_template.jinja"] = tokenizer.chat_template
    generation = _held(source, _GENERATION, Generation)
    ends = _listed(generation.get("eos_token_id", source.config.get("eos_token_id")))
    if end_of_turn_id(tokenizer) not in (None, *ends):
        generation["eos_token_id"] = eos_ids(source, tokenizer)
        files[_GENERATION] = _text(generation)
    pad = source.config.get("pad_token_id")
    pads = decoder_config(source).scored and pad in range(len(tokenizer))
    if pads and pad != tokenizer.pad_token_id:
        named = {"pad_token": tokenizer.convert_ids_to_tokens(pad)}
        files["tokenizer_config.json"] = _text(_held(source, "tokenizer_config.json") | named)
        if special := _held(source, "special_tokens_map.json"):
            files["special_tokens_map.json"] = _text(special | named)
    return files


def eos_ids(source: Source, tokenizer) -> list[int]:
    """Every token that ends an answer, by template, generation config and model config."""
    found = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    for stored in (source.config, _held(source, _GENERATION, Generation)):
        found |= set(_listed(stored.get("eos_token_id")))
    return sorted(found - {None})


def _held(source: Source, name: str, kind: Any = dict) -> dict:
    """What a JSON file of the source says; nothing where it is not there."""
    file = source.tokenizer_dir / name
    return read_json(file, kind) if file.is_file() else {}


def _listed(ids: int | list[int] | None) -> list[int | None]:
    return ids if isinstance(ids, list) else [ids]


def _text(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"
