"""A run whose chat template writes today's date keeps the one of its start."""

import shutil
from datetime import datetime

from refusals import ended

from alignjax import run as runs


class _Clock(datetime):
    today = datetime(2026, 1, 30, 12)

    @classmethod
    def now(cls, tz=None):
        return cls.today


def test_a_run_goes_on_with_the_date_of_its_start(monkeypatch, capsys, root, tmp_path):
    monkeypatch.setattr(runs, "datetime", _Clock)
    template, cache = tmp_path / "t.jinja", tmp_path / "cache"
    today = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"
    template.write_text(today + (root / "model/chat_template.jinja").read_text())
    settings = [f"--model.chat-template={template}", f"--data.cache-dir={cache}"]
    settings += ["--optimizer.schedule=constant", "--optimizer.warmup-ratio=0"]

    def trained(steps: int) -> tuple[int, str]:
        more = f"--batch.max-steps={steps}"
        return ended(monkeypatch, capsys, root, tmp_path / "run", *settings, more)

    assert trained(1) == (0, "")
    [*first] = sorted(file.read_bytes() for file in cache.rglob("tokens.bin"))
    _Clock.today = datetime(2026, 2, 1, 12)
    shutil.rmtree(cache)
    assert trained(2) == (0, "")
    assert sorted(file.read_bytes() for file in cache.rglob("tokens.bin")) == first
    (tmp_path / "run/started.txt").unlink()
    code, said = trained(3)
    assert code == 2 and "other data" in said
    (tmp_path / "run/started.txt").write_text("yesterday")
    code, said = trained(3)
    assert code == 2 and "started.txt" in said
