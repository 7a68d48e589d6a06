"""What a terminal is shown: every text as it is, and nothing that commands it."""

import os
import subprocess

import pytest
from refusals import prepare
from rich.table import Table
from rich.text import Text
from running import arguments, environment

from alignjax.progress import console, say

ODD = "[/x] [bold]b :smile: \x1b]0;evil\x1b \ud800\u202e"
SHOWN = "[/x] [bold]b :smile: \\x1b]0;evil\\x1b \\ud800\\u202e"


def table() -> Table:
    made = Table(title=ODD)
    made.add_column(ODD)
    made.add_row(Text(ODD, "bold"))
    return made


@pytest.mark.parametrize(
    ("shown", "times"),
    [(ODD, 1), (Text("a ") + Text(ODD, "green"), 1), (table, 3)],
    ids=["string", "Text", "table"],
)
def test_texts_are_shown_as_they_are(shown, times):
    with console.capture() as captured:
        say(shown) if isinstance(shown, str) else console.print(shown() if times > 1 else shown)
    text = captured.get()
    assert text.count(SHOWN) == times
    assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.slow  # a run
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_run_whose_log_is_read_no_more_ends_well(tmp_path, encoding):
    prepare(tmp_path)
    more = ("--batch.max-steps=1", "--samples.prompts=1", "--samples.max-tokens=2", "--name=só")
    env = environment(tmp_path / "cache") | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    reading, writing = os.pipe()
    command = arguments(tmp_path, "run", *more)
    done = subprocess.Popen(command, env=env, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    assert (done.communicate()[1], done.returncode) == ("", 0)
    assert (tmp_path / "run/export/model.safetensors").is_file()
