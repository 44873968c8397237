"""The bar in a terminal and the lines outside of one."""

import io
import math
import re
import sys

import pytest
from callback_fakes import TinyData, TinyModule, make_trainer
from rich import reconfigure

from callbacks.progress import CaptionProgressBar
from callbacks.validate_ends import ValidateAtEnds

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(tmp_path, bar, **kwargs):
    trainer = make_trainer(tmp_path, [bar, ValidateAtEnds()], enable_progress_bar=True, **kwargs)
    trainer.fit(TinyModule(), TinyData())
    return trainer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    fit(tmp_path, CaptionProgressBar(plain_every_s=1e9))
    lines = [line for line in capsys.readouterr().out.splitlines() if "prec" in line]
    assert lines[0] == "validation at step 0  prec 0.000"
    assert re.fullmatch(
        r"step 5/5  prec 0\.250  rec 0\.500  b-cap 0\.375  .* s/step, 0:00:00 left", lines[-2]
    )
    assert lines[-1].startswith("validation at step 5  prec 0.672")
    assert len(lines) == 3


def test_plain_lines_come_every_so_often(tmp_path, capsys):
    fit(tmp_path, CaptionProgressBar(plain_every_s=0))
    out = capsys.readouterr().out
    assert [f"step {i}/5" in out for i in range(1, 6)] == [True] * 5


def test_unknown_length_without_max_steps(tmp_path, capsys):
    # Epochs of a stream that is cut by hand: no total is known, and none is invented.
    bar = CaptionProgressBar(plain_every_s=0)

    class Cut(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    trainer = make_trainer(tmp_path, [bar], enable_progress_bar=True, max_steps=-1, max_epochs=1)
    trainer.fit(Cut(), TinyData())
    assert math.isinf(bar.total_train_batches)
    out = capsys.readouterr().out
    assert "epoch 0 batch 3  prec 0.250" in out
    assert "left" not in out


def test_refresh_rate_zero_is_silent(tmp_path, capsys):
    fit(tmp_path, CaptionProgressBar(refresh_rate=0, plain_every_s=0))
    assert "prec" not in capsys.readouterr().out


@pytest.mark.parametrize("max_steps", [5, -1])
def test_the_bar_in_a_terminal(tmp_path, monkeypatch, max_steps):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    reconfigure(file=terminal, force_terminal=True, width=160)
    bar = CaptionProgressBar(refresh_rate=200, leave=True)
    bar._console_kwargs = {"file": terminal, "force_terminal": True, "width": 160}
    try:
        fit(tmp_path, bar, max_steps=max_steps, max_epochs=-1 if max_steps > 0 else 1, limit_train_batches=5)
    finally:
        reconfigure()
    text = terminal.getvalue()
    assert "prec: 0.250" in text
    assert "5/5" in text
    assert ("Training" if max_steps > 0 else "Epoch 0") in text
    assert "-2" not in text.split("Training")[-1][:40]
