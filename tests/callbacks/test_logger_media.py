"""Images and tables of captions in each logger: fakes with the signatures of wandb 0.31, mlflow 3.17 and trackio 0.43."""

from __future__ import annotations

import csv
import io
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from callback_fakes import TinyData, TinyModule, make_record, make_trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

from balcap.trainer.trackio_logger import TrackioLogger
from callbacks.logger_media import media_of
from callbacks.rollout_log import RolloutLog, rollout_media
from callbacks.validate_ends import ValidateAtEnds

pytestmark = pytest.mark.filterwarnings("ignore")

COLUMNS = [
    "image", "caption", "tokens", "truncated", "precision", "linguistic", "shaped/precision",
    "shaped/linguistic", "advantage", "assertions",
]  # fmt: skip


class Wandb(WandbLogger):
    """Records what it is given."""

    def __init__(self) -> None:
        self.shown: list[tuple[Any, ...]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert all(isinstance(image, Image.Image) for image in images)
        assert all(len(values) == len(images) for values in kwargs.values())
        self.shown.append((key, step, [image.size for image in images], kwargs))

    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        assert type(data) is list
        assert {type(row) for row in data} == {list}  # wandb.Table takes no tuples
        self.shown.append((key, step, columns, data))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...
    def log_hyperparams(self, params: Any) -> None: ...
    def finalize(self, status: str) -> None: ...

    save_dir = name = version = experiment = None  # type: ignore[assignment]


class MlflowClient:
    def __init__(self) -> None:
        self.shown: list[tuple[Any, ...]] = []

    def log_image(
        self,
        run_id: str,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
        synchronous: bool | None = None,
    ) -> None:
        assert isinstance(image, Image.Image)
        self.shown.append((run_id, key, step, image.size))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.shown.append((run_id, artifact_file, list(csv.reader(io.StringIO(text)))))


class Mlflow(MLFlowLogger):
    def __init__(self) -> None:
        self.client = MlflowClient()

    experiment = property(lambda self: self.client)  # type: ignore[assignment]
    run_id = "a1"  # type: ignore[assignment]


class TrackioRun:
    def __init__(self, name: str | None, options: dict[str, Any]) -> None:
        self.name, self.options = name or "brave-owl-0", options
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.finished = False

    def log(self, metrics: dict, step: int | None = None) -> None:
        self.logged.append((metrics, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in the place of trackio."""
    module: Any = ModuleType("trackio")
    module.__spec__ = ModuleSpec("trackio", None)
    module.runs = []

    def init(
        project: str, name: str | None = None, space_id: str | None = None, **options: Any
    ) -> TrackioRun:
        module.runs.append(TrackioRun(name, {"project": project, "space_id": space_id, **options}))
        return module.runs[-1]

    module.init = init
    module.Image = lambda value, caption=None: ("image", value.size, caption)
    module.Table = lambda columns=None, data=None: ("table", columns, data)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_the_table_has_a_row_per_caption_and_none_where_a_value_is_missing():
    media = rollout_media(make_record(), 0, "val_rollouts/3", 7)
    assert list(media.columns) == COLUMNS
    assert media.table[0] == ["a.png", "A red bar.", 4, False, 1.0, 0.75, 1.0, 0.75, 1.0, "✓ a red bar"]
    second = dict(zip(COLUMNS, media.table[1], strict=True))
    assert (second["linguistic"], second["shaped/linguistic"]) == (pytest.approx(0.2), 0.0)
    assert (second["tokens"], second["truncated"], second["advantage"]) == (7, True, -1.0)
    assert second["assertions"] == "○ a bar\n✗ hope"
    assert media.title == "a.png: A red bar."
    assert [image.size for image in media.images] == [(512, 17)]
    last = dict(zip(COLUMNS, rollout_media(make_record(advantages=False), 1, "", 7).table[1], strict=True))
    assert [last[name] for name in ("precision", "shaped/linguistic", "advantage")] == [None] * 3
    assert last["assertions"] == ""


def test_wandb_gets_the_images_of_a_row_together_and_a_table():
    logger = Wandb()
    media = rollout_media(make_record(), 1, "train_rollouts/1", 5)
    media_of(logger)(logger, media)
    title = "b.png: A blue square."
    assert logger.shown == [
        ("train_rollouts/1", 5, [(8, 8), (9, 8)], {"caption": [title, title]}),
        ("train_rollouts/1/captions", 5, COLUMNS, [list(row) for row in media.table]),
    ]


def test_mlflow_gets_each_image_under_a_name_and_a_csv_file_per_step():
    logger = Mlflow()
    media_of(logger)(logger, rollout_media(make_record(), 1, "val_rollouts/1", 5))
    *images, (run_id, file, rows) = logger.client.shown
    assert images == [("a1", "val_rollouts/1", 5, (8, 8)), ("a1", "val_rollouts/1_2", 5, (9, 8))]
    assert (run_id, file) == ("a1", "val_rollouts/1/00000005.csv")
    assert rows[0] == COLUMNS
    assert rows[1][:4] == ["b.png", "Blue.", "2", "False"]
    assert rows[2][4] == ""  # missing is empty, not 0


def test_trackio_gets_images_and_a_table_at_the_step(trackio: Any):
    logger = TrackioLogger("captions", name="mine")
    media = rollout_media(make_record(), 1, "val_rollouts/1", 5)
    media_of(logger)(logger, media)
    title = "b.png: A blue square."
    (run,) = trackio.runs
    assert run.logged == [
        (
            {
                "val_rollouts/1": ("image", (8, 8), title),
                "val_rollouts/1_2": ("image", (9, 8), title),
                "val_rollouts/1/captions": ("table", COLUMNS, [list(row) for row in media.table]),
            },
            5,
        )
    ]


def test_a_trackio_run_goes_on_after_a_fit(trackio: Any):
    logger = TrackioLogger("captions", space_id="me/space", options={"private": True})
    assert (logger.name, logger.version) == ("captions", None)
    logger.finalize("success")  # of a run that logged nothing
    assert trackio.runs == []
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    logger.log_metrics({"val/loss": 2.0}, step=2)
    first, second = trackio.runs
    assert first.finished
    assert first.logged == [({"train/loss": 1.0}, 1)]
    assert first.config == {"lr": 0.1}
    assert second.name == logger.version == first.name
    assert second.options == {
        "project": "captions", "space_id": "me/space", "private": True, "resume": "allow", "embed": False,
    }  # fmt: skip


def test_trackio_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("balcap.trainer.trackio_logger.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install trackio"):
        TrackioLogger()


def test_other_loggers_show_nothing(tmp_path):
    assert media_of(CSVLogger(tmp_path)) is None
    assert media_of(DummyLogger()) is None
    log = RolloutLog(every_n_steps=1)
    trainer = SimpleNamespace(loggers=[CSVLogger(tmp_path)])
    log._show(trainer, "val", 0, make_record())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_run_shows_train_and_validation_in_all_its_loggers(tmp_path, trackio: Any):
    wandb, logger = Wandb(), TrackioLogger()
    log = RolloutLog(every_n_steps=2, max_images=1)
    loggers = [CSVLogger(tmp_path / "csv"), wandb, logger]
    trainer = make_trainer(tmp_path, [log, ValidateAtEnds()], logger=loggers, max_steps=3)
    trainer.fit(TinyModule(with_record=True), TinyData())
    expected = [
        ("val_rollouts/0", 0),
        ("train_rollouts/0", 1),
        ("train_rollouts/0", 3),
        ("val_rollouts/0", 3),
    ]
    assert [(key, step) for key, step, *_ in wandb.shown if not key.endswith("captions")] == expected
    shown = [(name, step) for metrics, step in trackio.runs[0].logged for name in metrics]
    assert [entry for entry in shown if entry[0].endswith("rollouts/0")] == expected
    assert trackio.runs[0].finished
