"""Killed and started again, in several processes, and on a disk that fills up."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time

import pytest
from conftest import mesh, tiny_config
from expomodels import bytes_in, expected, run, save_run, tensors_of
from expomodels import write_pair as write
from running import environment, finish, scripted, start

from alignjax import command, convert, lock
from alignjax.files import location
from alignjax.weights import layout, stream
from alignjax.weights.safetensors import open_directory

BIG = tiny_config(tied=False, vocab_size=40_000)  # its tables are of several parts


def line(root, *arguments: str, alpha: str = "0.3") -> list[str]:
    sides = [f"--{side}={root / side}" for side in ("weak", "strong")]
    out = [f"--out={root / 'out'}", f"--alpha={alpha}"]
    return [sys.executable, "-m", "alignjax.expo", *sides, *out, *arguments]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_every_byte_of_a_layout_belongs_to_one_part(tmp_path, to):
    write(tmp_path, dtype="bfloat16")
    source = open_directory(tmp_path / "strong")
    plan = (
        layout.hugging_face(source, "source", 20_000, 1000)
        if to == "hf"
        else layout.orbax(source, "source", 1000)
    )
    spans = {}
    for part in plan.parts:
        assert part.size <= 1000
        spans.setdefault(part.file, []).append((part.start, part.start + part.size))
    assert set(spans) == set(plan.sizes)
    for file, found in spans.items():
        at = len(plan.heads.get(file, b""))
        for first, last in sorted(found):
            assert first == at
            at = last
        assert at == plan.sizes[file]


def test_processes_share_the_bytes_out(monkeypatch, tmp_path):
    write(tmp_path, BIG)
    parts = layout.hugging_face(open_directory(tmp_path / "weak"), "source", 10**9, 1 << 16).parts
    monkeypatch.setattr(stream.jax, "process_count", lambda: 4)
    shares = []
    for number in range(4):
        monkeypatch.setattr(stream.jax, "process_index", lambda number=number: number)
        shares.append(stream.mine(parts))
    assert [part for share in shares for part in share] == parts
    sizes = [sum(part.size for part in share) for share in shares]
    assert max(sizes) - min(sizes) <= 2 << 16


class Killed(BaseException):
    """What no `except` of the library's takes for a mistake, as a kill."""


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_killed_after_any_part_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, to):
    write(tmp_path)
    whole = run(tmp_path, f"--out={tmp_path / 'whole'}", f"--to={to}", alpha="0.3,-1")
    original, written, limit = stream.write_part, [], [0]

    def write_part(*arguments):
        if len(written) == limit[0]:
            raise Killed
        written.append(arguments)
        original(*arguments)

    monkeypatch.setattr(stream, "write_part", write_part)
    monkeypatch.setattr(stream, "WORKERS", 1)
    for limit[0] in (1, 21, 31):  # each of the 30 parts is written to both outputs
        written.clear()
        with pytest.raises(Killed):
            run(tmp_path, f"--to={to}", alpha="0.3,-1")
        assert not (tmp_path / "out").exists()
    written.clear()
    limit[0] = -1
    out = run(tmp_path, f"--to={to}", alpha="0.3,-1")
    assert len(written) == 2 * (30 - 0 - 10 - 15)
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert files == {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    own = ("README.md", "_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt")  # paths, times
    for name in files:
        if name.name not in own:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_work_or_another_start_of_the_machine_begins_anew(tmp_path, monkeypatch):
    write(tmp_path)
    original = stream.write_part

    def write_part(*arguments):
        if arguments[2].name == "model.norm.weight":
            raise Killed
        original(*arguments)

    written = []

    def noting(*arguments):
        written.append(arguments)
        original(*arguments)

    table = tmp_path / "table.json"
    for how in ("alpha", "boot", "source", "table"):
        table.write_text('{"q_proj": %s}' % (0.5 if how == "alpha" else 0.3))
        monkeypatch.setattr(stream, "write_part", write_part)
        with pytest.raises(Killed):
            run(tmp_path, f"--alpha.table={table}")
        note = tmp_path / ".out.unfinished/done-0"
        assert int(note.read_text().split()[1]) > 0
        written.clear()
        monkeypatch.setattr(stream, "write_part", noting)
        alpha = "0.5" if how == "alpha" else "0.3"
        if how == "boot":
            note.write_text("another " + note.read_text().split()[1])
        if how == "table":
            table.write_text('{"q_proj": 0.3, "norm": 0.3}')
        if how == "source":
            for file in (tmp_path / "weak").glob("*.safetensors"):
                os.utime(file, ns=(1, 1))
        out = run(tmp_path, f"--alpha.table={table}", alpha=alpha)
        assert len(written) == 30
        assert bytes_in(out) == expected(tmp_path, float(alpha))
        shutil.rmtree(out)


# The command with small parts, each of which takes its time: who kills it meets it at work.
SLOW = """
import sys, time
from alignjax import expo
from alignjax.weights import stream

stream.MOST = 1 << 16
write_part = stream.write_part

def slowly(*arguments):
    time.sleep(0.01)
    write_part(*arguments)

stream.write_part = slowly
sys.exit(expo.main())
"""


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(tmp_path):
    write(tmp_path, BIG)
    env = environment(tmp_path / "cache")
    command = scripted(line(tmp_path, alpha="0.3,2"), SLOW)
    note, done = stream._Note(tmp_path / ".out.unfinished"), [0]
    for wait in (0.0, 0.05, 0.1):
        (running,) = start(command, env, 1, tmp_path / "logs")
        end = time.monotonic() + 600
        while note.read() <= done[-1] and time.monotonic() < end:
            assert running.process.poll() is None, running.log.read_text()
            time.sleep(0.001)
        time.sleep(wait)
        running.process.send_signal(signal.SIGKILL)
        assert running.process.wait() == -signal.SIGKILL
        assert (tmp_path / ".out.unfinished/about.json").exists()
        assert not (tmp_path / "out").exists()
        done.append(note.read())
    assert done == sorted(set(done))
    codes, outputs = finish(start(command, env, 1, tmp_path / "logs"))
    assert codes == [0], outputs
    for alpha in ("0.3", "2"):
        assert bytes_in(tmp_path / f"out/alpha_{alpha}") == expected(tmp_path, float(alpha))


# The command, which says at its end how many bytes of weights it read to extrapolate them.
COUNTING = """
import sys
from alignjax import expo
from alignjax.extrapolation import outputs
from alignjax.weights import stream, tensorfile

stream.MOST = 1 << 16
read, original, work = [], tensorfile.read_bytes, outputs.Work.__call__

def counted(self, part):
    def read_bytes(file, start, content):
        read.append(len(content))
        return original(file, start, content)
    tensorfile.read_bytes = read_bytes
    return work(self, part)

outputs.Work.__call__ = counted
code = expo.main()
print("read", sum(read), flush=True)
sys.exit(code)
"""


def own(directory) -> list:
    return list(tensors_of(directory).values())


@pytest.mark.slow
@pytest.mark.parametrize(("to", "saved"), [("hf", False), ("orbax", False), ("hf", True)])
def test_four_processes_write_the_same_and_each_reads_its_quarter(tmp_path, to, saved):
    """Of files as they are; what a run of 8 devices saved comes in Orbax's chunks."""
    write(tmp_path, BIG)
    env = environment(tmp_path / "cache")
    command = scripted(line(tmp_path, f"--to={to}"), COUNTING)
    if saved:
        mesh(fsdp=4, tensor=2)
        command.append(f"--strong={save_run(tmp_path, 'strong')}")
    codes, outputs = finish(start(command, env, 4, tmp_path / "logs"))
    assert codes == [0] * 4, "\n".join(outputs)
    read = [int(one.rsplit("read ", 1)[1]) for one in outputs]
    plain = ("weak",) if saved else ("weak", "strong")
    sides = sum(array.nbytes for side in plain for array in own(tmp_path / side))
    assert sum(read) == sides and max(read) < 1.05 / 4 * sides
    assert "wrote" in outputs[0] and not any("wrote" in one for one in outputs[1:])
    out = tmp_path / "out"
    if to == "orbax":
        arguments = [f"--src={out}", f"--dst={tmp_path / 'back'}"]
        assert convert.convert(convert.parse(arguments)) == 0
        out = tmp_path / "back"
    assert bytes_in(out) == expected(tmp_path, 0.3)


def refused(capsys, root) -> str:
    """The sentence of an extrapolation that a disk refuses, which leaves nothing behind."""
    assert command.run(lambda: run(root) and 0) == 2
    assert sorted(path.name for path in root.iterdir()) == ["strong", "weak"]
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said.removeprefix("error: ").rstrip()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    usage = shutil._ntuple_diskusage(10**9, 10**9, 30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert refused(capsys, tmp_path) == (
        f"--out={tmp_path}/out: it needs 0.1 MB, and 0.0 MB are free; free some space, or name "
        "another disk."
    )


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    original = os.pwrite

    def pwrite(opened, content, start):
        if start > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(opened, content, start)

    monkeypatch.setattr(os, "pwrite", pwrite)
    sentence = "the file could not be written (No space left on device); see to the disk."
    place = f"{tmp_path}/.out.unfinished/result/model.safetensors"
    assert refused(capsys, tmp_path) == f"{place}: {sentence}"
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert "(File too large)" in refused(capsys, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_side_that_breaks_off_leaves_nothing(tmp_path, capsys, monkeypatch):
    write(tmp_path)
    from alignjax.extrapolation import delta

    original = delta.measure

    def measure(*arguments):
        file = tmp_path / "weak/model-00002-of-00002.safetensors"
        found = original(*arguments)
        os.truncate(file, file.stat().st_size // 2)
        return found

    monkeypatch.setattr(delta, "measure", measure)
    assert " cannot be read (the file has become shorter); " in refused(capsys, tmp_path)


def test_several_processes_write_to_no_object_store(monkeypatch):
    monkeypatch.setattr(stream.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError) as error, stream.unfinished(location("gs://bucket/out"), {}):
        pass
    assert str(error.value) == (
        "gs://bucket/out: one process alone writes to an object store; start just one."
    )


def test_what_is_not_of_an_earlier_try_stays(tmp_path):
    write(tmp_path)
    place = tmp_path / ".out.unfinished"
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError) as error:
        run(tmp_path)
    assert str(error.value) == (
        f"{place}/thesis.txt: --out is made there first, and this is not of it; move it."
    )
    assert (place / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]"])
def test_a_damaged_note_of_an_earlier_try(tmp_path, damage):
    write(tmp_path)
    (tmp_path / ".out.unfinished/result").mkdir(parents=True)
    (tmp_path / ".out.unfinished/about.json").write_bytes(damage)
    run(tmp_path)
    assert (tmp_path / "out/model.safetensors").is_file()


def test_two_at_a_time_into_one_directory(tmp_path):
    write(tmp_path)
    with lock.held(tmp_path / ".out.unfinished"), pytest.raises(ValueError) as error:
        run(tmp_path)
    owner = json.loads((tmp_path / ".out.unfinished/.lock").read_text())
    assert str(error.value) == (
        f"{tmp_path}/.out.unfinished: another run is writing here (process {os.getpid()} on "
        f"{owner['host']}, since {owner['since']}); stop that one, or choose another --out."
    )
