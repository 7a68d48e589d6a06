"""The model card, README.md, of a model that a run has trained."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from alignjax import __version__
from alignjax.errors import UserError
from alignjax.files import read_json

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers")


def read_settings(directory: Path) -> dict:
    """Return a run's settings from its config.json; raises UserError where that is no run's."""
    found = read_json(directory / "config.json")
    for key in ("name", "model.path", "data.path", "optimizer.rule"):
        value = found
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, str):
            raise UserError(
                f"{directory}/config.json: this is not a run's, which has the key {key}; choose "
                "another --run_dir."
            )
    return found


def model_card(run: dict, scored: bool = False) -> str:
    """A card from a run's config.json: base model, data, every setting, and versions."""
    base, data = run["model"]["path"], run["data"]["path"]
    on_hub = (
        base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    )
    decay = run["optimizer"].get("ema_decay")
    average = f" The weights average those after each step, of decay {decay}." if decay else ""
    task = "text-classification" if scored else "text-generation"
    head = ["library_name: transformers", f"pipeline_tag: {task}", "tags: [alignjax]"]
    head += [f"base_model: {base}"] if on_hub else []
    versions = {"alignjax": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in _PACKAGES}
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# {run['name']}",
            "",
            f"`{base}`, trained with alignjax.{average} The license of the base model applies.",
            "",
            "| | |",
            "| --- | --- |",
            f"| base model | `{base}` |",
            f"| data | `{data}` |",
            *(f"| {name} | {number} |" for name, number in versions.items()),
            "",
            "## Config",
            "",
            "```json",
            json.dumps(run, indent=2),
            "```",
            "",
        ]
    )
