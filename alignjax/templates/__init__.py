"""Chat templates for models that have none of their own, or not the one that is wanted.

Each is a file NAME.jinja here, written for transformers' renderer.
"""

from pathlib import Path

from alignjax.errors import UserError

# What a template must find in the tokenizer as one token each; "eos" is its EOS token.
NEEDS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama2": ("eos",),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("eos",),
    "mistral-v3": ("[INST]", "[/INST]", "eos"),
    "mistral-v3-tekken": ("[INST]", "[/INST]", "eos"),
    "mistral-v7": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "eos"),
    "tulu": ("eos",),
    "vicuna": ("eos",),
    "zephyr": ("eos",),
}


def choose(tokenizer, name: str) -> str:
    """The text of the template that a user names for a tokenizer: one of `NEEDS`, or a file.

    Raises UserError for neither, and for a tokenizer that lacks a token the template is made of.
    """
    file = Path(__file__).parent / f"{name}.jinja" if name in NEEDS else Path(name)
    if not file.is_file():
        raise UserError(
            f"model.chat_template={name}: there is no such file, nor is it one of: "
            f"{', '.join(NEEDS)}."
        )
    for token in NEEDS.get(name, ()):
        if token == "eos" and not tokenizer.eos_token:
            raise UserError(
                f"model.chat_template={name}: the tokenizer has no EOS token, which ends an "
                f"answer; name another of: {', '.join(NEEDS)}."
            )
        if token != "eos" and len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise UserError(
                f"model.chat_template={name}: {token} is no token of the model's tokenizer; name "
                f"another of: {', '.join(NEEDS)}."
            )
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeError, OSError):
        said = "it cannot be read as UTF-8 text; name another file."
        raise UserError(f"model.chat_template={name}: {said}") from None
