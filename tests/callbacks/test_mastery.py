"""The curriculum: what is mastered, and which rows are passed over then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from balcap.data.order import image_hash, read_order
from callbacks.mastery import Mastery, mastered_rows
from tests.data.test_stream import ids, make_stream, train
from tests.fakes import FixedEngine
from tests.support import metrics

NAN = float("nan")


class SameCaptions(FixedEngine):
    """Every caption is the reference."""

    @staticmethod
    def _caption(reference: str, g: int) -> str:
        return reference


def test_a_group_is_mastered_where_no_reward_has_a_spread_and_the_score_is_high() -> None:
    rewards = torch.tensor(
        [
            [[1.0, 0.9, 0.8], [1.0, 0.9, 0.8]],  # constant and good
            [[1.0, 0.9, 0.8], [1.0, 0.9, 0.7]],  # one reward has a spread
            [[0.2, 0.1, 0.3], [0.2, 0.1, 0.3]],  # constant and bad
            [[1.0, 0.9, NAN], [1.0, 0.9, NAN]],  # nobody knows
        ]
    )
    scores = torch.tensor([[0.9, 0.9], [0.9, 0.9], [0.2, 0.2], [NAN, NAN]])
    assert mastered_rows(rewards, scores, 0.9) == [True, False, False, False]


def test_mastered_rows_are_passed_over_and_come_again(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, rows=12, batch_size=3)
    mastered = {f"{n}.png" for n in range(6)}
    stream.mastered, stream.skip_share = frozenset(mastered), 0.5
    batches = train(stream, 40)
    expected, visits = [], read_order(12, 0, 1, 0, 0)
    for position, row in enumerate(visits):
        name = f"{row}.png"
        if (
            name not in mastered or image_hash(0, f"{position // 12}\0{name}") >= 2**63
        ):  # the upper half of 64 bits
            expected.append(name)
        if len(expected) == 120:
            break
    assert ids(batches) == expected
    assert sum(b.cursor.skipped for b in batches if b.cursor) + 120 == position + 1
    counts = {name: expected.count(name) for name in set(expected)}
    assert 0 < min(counts.values()) <= max(counts[name] for name in mastered) < max(counts.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_skips_continues_exactly(tmp_path: Path, workers: int) -> None:
    def stream() -> Any:
        made = make_stream(tmp_path, rows=20, batch_size=3, num_workers=workers)
        made.mastered, made.skip_share = frozenset(f"{n}.png" for n in range(10)), 0.75
        return made

    whole = ids(train(stream(), 14, workers))
    first, second = stream(), stream()
    part = ids(train(first, 5, workers))
    second.restore(first.state())
    assert part + ids(train(second, 9, workers)) == whole


def test_all_ranks_and_later_groups_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    mastery, logged = Mastery(), {}
    monkeypatch.setattr(
        "callbacks.mastery.gather_objects", lambda trainer, mine: [mine, {"b": True, "c": True}]
    )
    monkeypatch.setattr("callbacks.mastery.sums", lambda trainer, values: [2 * v for v in values])
    found = iter([{"a": True}, {"a": False}])
    monkeypatch.setattr(mastery, "observe", lambda record: next(found))
    module: Any = type("Module", (), {"log": lambda self, name, value, **_: logged.update({name: value})})()
    batch: Any = type("Batch", (), {"cursor": type("Cursor", (), {"skipped": 3})})
    for expected in ({"a", "b", "c"}, {"b", "c"}):
        mastery.on_train_batch_end(None, module, {"records": [None]}, batch, 0)  # type: ignore[arg-type]
        assert mastery.mastered == expected
    assert logged == {"train/mastered": 2.0, "train/rows_skipped": 6.0}
    assert mastery.skipped == set()  # not before the next epoch
    other = Mastery()
    other.load_state_dict(mastery.state_dict())
    assert (other.mastered, other.skipped) == ({"b", "c"}, set())


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Mastery\.threshold: 2") as error:
        Mastery(threshold=2, skip_share=1.0)
    assert "Mastery.skip_share: 1.0" in str(error.value)
    module: Any = type("Module", (), {"rewards": type("Suite", (), {"names": ("precision", "linguistic")})})
    with pytest.raises(ValueError, match="lacks recall"):
        Mastery().on_fit_start(None, module)  # type: ignore[arg-type]


def test_a_run_skips_what_it_has_mastered_also_when_it_goes_on(
    fit_arguments: Any, cli: Any, tmp_path: Path
) -> None:
    shared: dict[str, Any] = {
        "trainer.callbacks": "[{class_path: callbacks.mastery.Mastery, init_args: {threshold: 0.5}}]",
        "model.engine": "tests.callbacks.test_mastery.SameCaptions",
        "data.max_rows": 8,
        "data.val_size": 0,
        "export.enabled": False,
    }
    cli(fit_arguments(**shared, trainer__max_steps=5))  # an epoch of four batches, and one more
    cli([*fit_arguments(**shared, trainer__max_steps=7), "--ckpt_path", "last"])
    rows = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert [float(row["train/mastered"]) for row in rows] == [2, 4, 6, 8, 8, 8, 8]

    from balcap.data.datamodule import CaptionDataModule

    settings = {
        a.partition("=")[0][7:]: a.partition("=")[2]
        for a in fit_arguments(**shared)
        if a.startswith("--data.")
    }
    table = CaptionDataModule(data=settings["data"], cache_dir=settings["cache_dir"]).table
    names, kept, skipped = table.column("sample_id"), 0, np.zeros(3)
    for position, row in enumerate(
        read_order(8, 0, 1, 0, 8), 8
    ):  # all eight are mastered from the second epoch on
        if image_hash(0, f"{position // 8}\0{names[row]}") / 2**64 < 0.75:
            skipped[kept // 2] += 1
        else:
            kept += 1
        if kept == 6:
            break
    assert [float(row["train/rows_skipped"]) for row in rows] == [0, 0, 0, 0, *skipped]
