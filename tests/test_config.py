"""Configs: found by name or path, overridden by type, refused in sentences, told by --help."""

import dataclasses
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from alignjax import config as configs
from alignjax.checks import check_evaluation
from alignjax.config import DPO, RM, SFT, Batch, Data, Model, RMEval, Training
from alignjax.errors import UserError

ROOT = Path(configs.__file__).resolve().parents[1]
XWIN = [f"{stage}_{size}b" for stage in ("sft", "rm", "dpo") for size in (7, 13, 70)]
NAMES = [
    "dpo_smollm2",
    "dpo_smollm2_ultrafeedback",
    "lion_gemma2b_sft",
    "lion_llama3_8b_sft",
    "lion_gemma2b_dpo",
    "lion_llama3_8b_dpo",
    "rm_smollm2",
    "sft_smollm2",
    "tulu2_7b_dpo",
    "tulu2_13b_dpo",
    "tulu2_70b_dpo",
    *(f"xwin_{name}" for name in XWIN),
    *XWIN,
    "zephyr_7b_dpo",
    *(f"zephyr_7b_dpo_{part}" for part in (5, 10, 20, 40)),
]
EVALUATIONS = ["rm_eval"]
RUNNABLE = DPO(model=Model(path="m"), data=Data(path="d.jsonl"), batch=Batch(pairs=4))


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def parse(*arguments: str) -> Training:
    return configs.parse("alignjax.train", ["--config=dpo_smollm2", *arguments])


def leaves(config, prefix: str = "") -> dict[str, object]:
    found = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = value
    return found


def comments(config) -> dict[str, str]:
    """The comment behind each leaf field, read from the source and not through tyro."""
    source = (ROOT / "alignjax" / "config.py").read_text()
    found = {}

    def walk(node, prefix):
        classes = [kind.__name__ for kind in type(node).__mro__[:-1]]
        bodies = (re.search(rf"class {c}\b.*?:\n(.*?)\n\n\n", source, re.S) for c in classes)
        body = "\n".join(found.group(1) for found in bodies)
        for item in dataclasses.fields(node):
            value = getattr(node, item.name)
            if dataclasses.is_dataclass(value):
                walk(value, f"{prefix}{item.name}.")
            else:
                line = re.search(rf"^    {item.name}: .*$", body, re.M).group(0)
                found[prefix + item.name] = line.partition("  # ")[2]

    walk(config, "")
    return found


def help_entries(text: str) -> dict[str, str]:
    """Each key of a help text with the words behind it, boxes and line breaks taken out."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    words = " ".join(" ".join(lines).replace("│", " ").split())
    parts = re.split(r"--([a-z0-9_.-]+) (?:(?:STR|INT|FLOAT|\{[^}]*\}) )?", words)
    entries = dict(zip(parts[1::2], parts[2::2], strict=True))
    del entries["help"]
    return entries


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_loads_by_name_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configs.load("sft_smollm2")
    assert isinstance(config, SFT)
    assert (config.name, config.batch.sequences, config.data.max_length) == ("sft_smollm2", 8, 512)


def test_loads_by_path_relative_and_absolute(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("from alignjax.config import DPO\nconfig = DPO(name='mine', beta=0.25)\n")
    monkeypatch.chdir(tmp_path)
    assert configs.load("mine.py") == DPO(name="mine", beta=0.25)
    assert configs.load(str(file)) == DPO(name="mine", beta=0.25)


def test_names_are_those_of_the_files_and_tables_with_a_line_each():
    assert list(configs.names()) == NAMES
    assert configs.names()["dpo_70b"] == "Short for xwin_dpo_70b."
    assert list(configs.names("alignjax.evaluate")) == EVALUATIONS
    first = "SFT of SmolLM2-135M-Instruct on a sample of databricks-dolly-15k's conversations."
    assert configs.names()["sft_smollm2"] == first


def test_a_file_holds_one_config_or_a_table(tmp_path, monkeypatch):
    begin = '"""What it is.\n\nAnd more."""\nfrom alignjax.config import DPO, SFT\n'
    (tmp_path / "one.py").write_text(begin + "config = DPO(name='one')\n")
    table = "configs = {'b': ('Second.', SFT(name='b')), 'a': ('First.', DPO(name='a'))}\n"
    (tmp_path / "paper.py").write_text(begin + table)
    (tmp_path / "_hidden.py").write_text("config = 1\n")
    monkeypatch.setattr(configs, "config_dir", lambda: tmp_path)
    assert list(configs.names().items()) == [
        ("one", "What it is."),
        ("b", "Second."),
        ("a", "First."),
    ]
    assert (configs.load("one"), configs.load("b")) == (DPO(name="one"), SFT(name="b"))
    with pytest.raises(ValueError, match="one of: one, b, a"):
        configs.load("paper")


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError) as caught:
        configs.load("dpo_llama9")
    assert str(caught.value) == (
        "--config=dpo_llama9: there is no such config or file; give a path ending in .py or one "
        f"of: {', '.join(NAMES)}."
    )


def test_file_without_a_config_is_refused(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("config = {'beta': 0.1}\n")
    with pytest.raises(ValueError) as caught:
        configs.load(str(file))
    sentence = f"{file}: set `config` to SFT(...) or RM(...) or DPO(...) of alignjax.config."
    assert str(caught.value) == sentence
    file.write_text("from alignjax.config import DPO\nclass My(DPO): pass\nconfig = My()\n")
    with pytest.raises(UserError) as caught:
        configs.load(str(file))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("config = DPO(", ", line 2: ", "SyntaxError"),
        ("\nconfig = DPO(betta=0.1)", ", line 3: ", "unexpected keyword argument 'betta'"),
        ("import json\njson.loads('{')", ", line 3: ", "JSONDecodeError"),
        ("raise SystemExit", ", line 2: ", "SystemExit"),
        ("config = DPO(loss='IPO')", ": loss='IPO'", "'sigmoid' or 'robust' or 'hinge'"),
        ("config = DPO(beta='0.1')", ": beta='0.1'", "a finite number"),
        ("config = DPO(data=Data(weights=[1.0]))", ": data.weights=[1.0]", "a string"),
        ("config = DPO(data=Data(path=Path('x')))", ": data.path=PosixPath('x')", "a string"),
        ("config = DPO(mesh=Model())", ": mesh=Model(", "Mesh(...)"),
        ("config = DPO(optimizer=Optimizer(rule='adam'))", ": optimizer.rule='adam'", "'adamw'"),
    ],
)
def test_a_file_that_gives_no_good_config_is_refused_with_its_place(tmp_path, text, place, said):
    file = tmp_path / "mine.py"
    file.write_text(f"from alignjax.config import *\n{text}\n")
    with pytest.raises(UserError) as caught:
        configs.load(str(file))
    assert str(caught.value).startswith(f"{file}{place}") and said in str(caught.value)


def test_without_overrides_the_config_is_the_files():
    assert parse() == configs.load("dpo_smollm2")


@pytest.mark.parametrize(
    ("argument", "part", "field", "value"),
    [
        ("--optimizer.learning_rate=1e-6", "optimizer", "learning_rate", 1e-6),
        ("--optimizer.learning-rate=1e-6", "optimizer", "learning_rate", 1e-6),
        ("--batch.pairs=4", "batch", "pairs", 4),
        ("--data.max-length=99", "data", "max_length", 99),
        ("--data.max_length=99", "data", "max_length", 99),
        ("--data.path=a=b.jsonl", "data", "path", "a=b.jsonl"),
        ("--compute.dtype=bfloat16", "compute", "dtype", "bfloat16"),
        ("--mesh.fsdp=-1", "mesh", "fsdp", -1),
    ],
)
def test_override_changes_one_value_and_no_other(argument, part, field, value):
    base = configs.load("dpo_smollm2")
    changed = parse(argument)
    expected = dataclasses.replace(getattr(base, part), **{field: value})
    assert changed == dataclasses.replace(base, **{part: expected})
    assert type(getattr(getattr(changed, part), field)) is type(value)


def test_config_is_named_in_one_word_or_two():
    arguments = ["--beta=0.5", "--config", "dpo_smollm2"]
    assert configs.parse("alignjax.train", arguments) == parse("--beta=0.5")
    assert parse("--beta=0.5").beta == 0.5


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--batch.pairs=many", "invalid literal for int() with base 10: 'many'"),
        ("--batch.pairs=1.5", "invalid literal for int() with base 10: '1.5'"),
        ("--beta=strong", "could not convert string to float: 'strong'"),
        ("--compute.dtype=float8", "float8"),
    ],
)
def test_an_ill_typed_value_exits_with_2(argument, said, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argument)
    assert caught.value.code == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--config=dpo_smollm2", "--mesh.pipeline=2"],
            "--mesh.pipeline: there is no such key; there are mesh.fsdp, mesh.replica, "
            "mesh.tensor.",
        ),
        (
            ["--config=sft_smollm2", "--beta=0.1"],
            "--beta: there is no such key; there are batch.*, checkpoint.*, compute.*, data.*, "
            "export.*, learned_words, log.*, mesh.*, model.*, name, optimizer.*, run_dir, "
            "samples.*, seed, wandb.",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_those_that_exist(arguments, sentence):
    with pytest.raises(ValueError) as caught:
        configs.parse("alignjax.train", arguments)
    assert str(caught.value) == sentence


def test_no_config_says_which_there_are():
    with pytest.raises(ValueError) as caught:
        configs.parse("alignjax.train", ["--beta=0.1"])
    first, _, listing = str(caught.value).partition("\n")
    assert first == "which run? python -m alignjax.train --config=NAME|PATH [--a.b=value ...]"
    listed = [line.split(":")[0].strip() for line in listing.splitlines()[1:]]
    assert listing.splitlines()[0] == "Configs:"
    assert listed == NAMES


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_config_of_an_evaluation_loads_and_passes(name):
    config = configs.load(name, "alignjax.evaluate")
    check_evaluation(config)
    assert config.name == name


def test_a_config_of_another_command_is_refused_with_its_name():
    with pytest.raises(ValueError) as caught:
        configs.load("rm_eval")
    assert str(caught.value) == (
        "rm_eval: its config is for python -m alignjax.evaluate; "
        "alignjax.train takes SFT(...) or RM(...) or DPO(...)."
    )


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("alignjax.train", ""),
        ("alignjax.train", "dpo_smollm2"),
        ("alignjax.train", "sft_smollm2"),
        ("alignjax.evaluate", ""),
        ("alignjax.evaluate", "rm_eval"),
    ],
)
def test_help_tells_every_key_with_its_comment_and_default(command, name):
    done = python("-m", command, *([f"--config={name}"] if name else []), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    told = help_entries(done.stdout)
    config = configs.load(name, command) if name else configs.COMMANDS[command][-1]()
    helps = comments(config)
    assert set(helps) == set(leaves(config))
    assert set(told) == {key.replace("_", "-") for key in helps}
    for key, value in leaves(config).items():
        assert len(helps[key]) > 3, key
        shown = "''" if value == "" else str(value)
        words = told[key.replace("_", "-")]
        assert words.startswith(f"{helps[key]} (default: {shown})"), key
    for config_name, line in configs.names(command).items():
        assert f"{config_name}: {line}" in " ".join(done.stdout.split())


@pytest.mark.parametrize("stage", [SFT(), RM(), DPO(), RMEval()])
def test_every_leaf_has_a_comment(stage):
    for key, comment in comments(stage).items():
        assert len(comment) > 3, key


@pytest.mark.parametrize("module", ["alignjax", "alignjax.config", "alignjax.evaluate"])
def test_import_brings_in_nothing_slow(module):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = set(done.stdout.split())
    assert "alignjax" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "torch", "transformers", "numpy", "grain", "tyro"}


@pytest.mark.parametrize("command", ["train", "evaluate", "convert", "expo"])
def test_help_takes_less_than_a_second_of_cpu(command):
    python("-m", f"alignjax.{command}", "--help")
    seconds = []
    for _ in range(3):
        before = children_cpu_seconds()
        assert python("-m", f"alignjax.{command}", "--help").returncode == 0
        seconds.append(children_cpu_seconds() - before)
    assert 0 < min(seconds) < 1.0


def test_a_users_mistake_is_one_sentence_and_exit_code_2():
    done = python("-m", "alignjax.train", "--config=dpo_smollm2", "--batch.rows=2")
    assert (done.returncode, done.stdout) == (2, "")
    sentence = "error: set exactly one of batch.pairs and batch.rows to more than 0.\n"
    assert done.stderr == sentence


def test_to_dict_is_plain_and_whole():
    plain = configs.to_dict(RUNNABLE)
    assert plain["batch"]["pairs"] == 4
    assert plain["optimizer"]["learning_rate"] == 5e-7
    flat = {}
    for key, value in plain.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{key}.{name}".rstrip("."): item for name, item in inner}
    assert flat == leaves(RUNNABLE)


def test_directories(monkeypatch, tmp_path):
    assert configs.run_dir(DPO(name="x")) == Path("runs/x")
    assert configs.run_dir(DPO(name="x", run_dir="/a/b")) == Path("/a/b")
    monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path))
    assert configs.cache_dir(DPO()) == tmp_path
    assert configs.cache_dir(DPO(data=Data(cache_dir="/c"))) == Path("/c")
    monkeypatch.delenv("ALIGNJAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configs.cache_dir(DPO()) == tmp_path / ".cache" / "alignjax"


def test_a_cache_on_an_object_store_is_refused(monkeypatch):
    monkeypatch.setenv("ALIGNJAX_CACHE", "gs://bucket/cache")
    with pytest.raises(UserError, match="gs://bucket/cache"):
        configs.cache_dir(configs.DPO())
