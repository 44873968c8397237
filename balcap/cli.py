"""The command line: LightningCLI, a run folder, and one check of the whole config before anything loads."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from balcap.utils.imports import import_torchmetrics_lightly

import_torchmetrics_lightly()  # before Lightning, which imports torchmetrics

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.utilities import rank_zero_only  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException  # noqa: E402

from balcap.commands.benchmark import config_of, run_test  # noqa: E402
from balcap.commands.estimate import (  # noqa: E402
    HERE,
    ONE_DEVICE,
    BalCapTrainer,
    estimate_problems,
    plan_problems,
)
from balcap.config import (  # noqa: E402
    ConfigError,
    column_problems,
    model_problems,
    reference_problems,
    trainer_problems,
)
from balcap.data import CaptionDataModule  # noqa: E402
from balcap.judge import BudgetSpent  # noqa: E402
from balcap.module import BalCapModule  # noqa: E402
from balcap.policy.identity import identity  # noqa: E402
from balcap.trainer.checkpoint import CheckpointError, find_checkpoint, read_checkpoint  # noqa: E402
from balcap.utils.arguments import Parser, SettingsFile  # noqa: E402
from balcap.utils.errors import RunStopped, UserError, next_line  # noqa: E402
from balcap.utils.run_folder import holds_fit, in_use, write_problem  # noqa: E402
from callbacks.benchmark_eval import BenchmarkEval  # noqa: E402
from callbacks.caption_writer import CaptionWriter  # noqa: E402
from callbacks.checkpoint import RunCheckpoint  # noqa: E402
from callbacks.curves import RunCurves  # noqa: E402
from callbacks.export import ExportPolicy  # noqa: E402
from callbacks.progress import CaptionProgressBar  # noqa: E402
from callbacks.report import RunReport  # noqa: E402
from callbacks.rollout_log import RolloutLog  # noqa: E402
from callbacks.run_config import SaveRunConfig  # noqa: E402
from callbacks.trace import ChromeTrace  # noqa: E402
from callbacks.validate_ends import ValidateAtEnds  # noqa: E402


class ConfigFile(SettingsFile):
    """``--config``: merged into what stands before it, but one that names a judge's model replaces the whole judge."""

    def prepare(self, content: dict[str, Any], namespace: Any) -> None:
        judge = (content.get("model") or {}).get("judge")
        if isinstance(judge, dict) and "model" in {**judge, **(judge.get("init_args") or {})}:
            namespace.pop("model.judge", None)


NO_RUN = {"estimate": HERE, "plan": HERE, "check": ONE_DEVICE}
"""Subcommands that leave the run folder alone, and settings of their trainer."""

RESULTS = (
    "report.html", "README.md", "checkpoints/last.ckpt", "export", "curves.png", "metrics.csv", "rollouts", "captions.jsonl",
    "benchmarks.json", "bad_rows.jsonl",
)  # fmt: skip
"""What a run's last line names, where it is there."""


class RunParser(Parser, LightningArgumentParser):
    """Lightning's, with short errors."""


class BalCapCLI(LightningCLI):
    """``fit``, ``check``, ``plan``, ``estimate``, ``validate``, ``predict`` and ``test``, with all outputs of a run in
    ``run_dir``."""

    def __init__(self, args: Any = None) -> None:
        self.given = sys.argv[1:] if args is None else list(args)
        super().__init__(
            BalCapModule,
            CaptionDataModule,
            trainer_class=BalCapTrainer,
            args=args,
            seed_everything_default=0,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            parser_class=RunParser,
            parser_kwargs={
                "prog": "main.py",
                "description": "Train image captioners with balanced rewards (arXiv 2605.07394).",
            },
            trainer_defaults={
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "max_epochs": -1,
                "enable_model_summary": False,  # it sees no FLOPs, and no 4-bit weights for what they are
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skip = {"model", "dataloaders", "datamodule", "weights_only"}
        return {
            "fit": {*skip, "train_dataloaders", "val_dataloaders"},
            "check": skip,
            "plan": {*skip, "launch"},
            "estimate": {*skip, "launch"},
            "validate": skip,
            "predict": {*skip, "return_predictions"},
            "test": {*skip, "verbose"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help="YAML file; a judge in it replaces that of those before it.",
        )
        for action in parser._actions:
            if action.dest == "print_config":
                action.help = "Print every setting, and exit; with --changed only those not as by default."
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir", type=str, default="runs/latest", help="Folder for all outputs of the run."
        )
        parser.add_argument(
            "--resume",
            type=Literal["auto", None],
            default=None,
            help="fit: auto goes on from the run folder's last checkpoint where there is one, and else starts.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RolloutLog, "rollout_log")
        parser.add_lightning_class_args(CaptionProgressBar, "progress")
        parser.add_lightning_class_args(ValidateAtEnds, "validate_ends")
        parser.add_lightning_class_args(ExportPolicy, "export")
        parser.add_lightning_class_args(RunCurves, "curves")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_lightning_class_args(CaptionWriter, "captions")
        parser.add_lightning_class_args(ChromeTrace, "trace")
        parser.add_lightning_class_args(BenchmarkEval, "benchmark_eval")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "data.run_dir")
        for target, name in (
            ("checkpoint.dirpath", "checkpoints"),
            ("rollout_log.dirpath", "rollouts"),
            ("export.dirpath", "export"),
            ("captions.path", "captions.jsonl"),
            ("trace.path", "trace.json"),
            ("benchmark_eval.dirpath", "benchmarks"),
        ):
            parser.link_arguments("run_dir", target, compute_fn=_below(name))
        parser.link_arguments(
            "run_dir", "model.judge.init_args.ledger", compute_fn=_below("judge_ledger.sqlite")
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Lightning would read hyperparameters from the whole checkpoint here; ours hold none."""

    def before_instantiate_classes(self) -> None:
        _quieten(self.config[self.subcommand].model.policy.load_in_4bit)
        self.checkpoint: Path | None = None
        options = self.config[self.subcommand]
        self._run_problems = [] if self.subcommand in NO_RUN else self._find_checkpoint(options)
        self.save_config_kwargs = {"checkpoint": self.checkpoint}

    def _find_checkpoint(self, options: Any) -> list[str]:
        """Sets `checkpoint`; what is wrong with where the run goes on from, or begins."""
        name, run_dir, fits = options.ckpt_path, options.run_dir, self.subcommand == "fit"
        if options.resume and (name or not fits):
            return ["resume: it is for fit, and takes the place of ckpt_path; remove it"]
        try:
            if name or options.resume:
                self.checkpoint = find_checkpoint(name or "last", run_dir)
        except CheckpointError as error:
            return [f"ckpt_path: {error}"]
        if name and self.checkpoint is None:
            instead = "start with --resume auto, which needs none" if fits else "name a checkpoint's file"
            return [f"ckpt_path: there is no checkpoint in {run_dir}/checkpoints; {instead}"]
        if why := write_problem(run_dir):
            return [f"run_dir: {run_dir} cannot be made or written: {why}"]
        if _is_first_rank() and fits and holds_fit(run_dir):
            other = "choose another folder with --run_dir"
            if not (name or options.resume):
                return [
                    f"run_dir: {run_dir} holds a run already; continue it with --ckpt_path last (--resume auto "
                    f"where it may have no checkpoint yet), or {other}"
                ]
            if self.checkpoint and Path(run_dir).resolve() not in self.checkpoint.resolve().parents:
                return [f"run_dir: {run_dir} holds a run already, not that of {self.checkpoint}; {other}"]
        return []

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # of a class on its own settings; the parser wraps it
            cause: BaseException = error
            while isinstance(cause.__cause__, ValueError):
                cause = cause.__cause__
            raise ConfigError([*self._run_problems, str(cause)], self.given) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        from lightning.pytorch.loggers import TensorBoardLogger

        from balcap.trainer.loggers import RunCSVLogger

        options = self.config[self.subcommand]
        if self.subcommand in NO_RUN:
            kwargs |= NO_RUN[self.subcommand]
        elif (loggers := self._get(self.config_init, "trainer").logger) is not False:
            saved = None if self.checkpoint is None else read_checkpoint(self.checkpoint)
            keep, logged = (saved["global_step"], saved["balcap"].get("logged")) if saved else (None, None)
            if loggers in (None, True):
                loggers = TensorBoardLogger(options.run_dir, name="tensorboard", version="")
            kwargs["logger"] = [  # metrics.csv in any case: the curves and the report are made of it
                RunCSVLogger(options.run_dir, keep if self.subcommand == "fit" else math.inf, logged),
                *(loggers if isinstance(loggers, list) else [loggers]),
            ]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:  # no such device here, for one
            raise ConfigError([*self._problems(), f"trainer: {error}"], self.given) from None
        assert isinstance(self.model, BalCapModule)
        problems = trainer_problems(trainer, self.model, str(self.subcommand))
        if problems := list(dict.fromkeys([*self._problems(), *problems])):
            raise ConfigError(problems, self.given)
        return trainer

    def _problems(self) -> list[str]:
        assert isinstance(self.model, BalCapModule)
        assert isinstance(self.datamodule, CaptionDataModule)
        if self.subcommand == "estimate":
            return estimate_problems(self.model, self.datamodule)
        if self.subcommand == "plan":
            return plan_problems(self.model)
        if self.subcommand == "test":
            return self._run_problems + self._test_problems(self.model)
        if self.subcommand == "check":
            options = self.config[self.subcommand]
            given = [name for name in ("ckpt_path", "resume") if options[name]]
            where = "the weights that are checked are those of model.policy.model; remove it"
            own = [
                *model_problems(self.model, judges=False),
                *self.datamodule.problems("fit"),
                *column_problems(self.model, self.datamodule.settings.columns),
            ]
            return [f"{name}: {where}" for name in given] + own
        judges = self.subcommand != "predict"
        problems = [*model_problems(self.model, judges), *self.datamodule.problems(str(self.subcommand))]
        if judges:
            problems += column_problems(self.model, self.datamodule.settings.columns)
            problems += reference_problems(self.model, self.datamodule.settings.require_captions)
        if self.subcommand == "fit":
            monitor, evaluation = (
                self._get(self.config_init, part) for part in ("checkpoint", "benchmark_eval")
            )
            problems += evaluation.monitor_problems(monitor.monitor)
        if self.subcommand == "predict":
            captions = self._get(self.config_init, "captions")
            captions.settings = self._caption_settings(self.model, self.datamodule)
            problems += captions.problems()
        return self._run_problems + problems

    def _test_problems(self, model: BalCapModule) -> list[str]:
        """Of benchmarks, the policy and the judge, where a benchmark has none of its own."""
        benchmarks = self._get(self.config_init, "benchmark_eval")
        judges = any(benchmark.judge is None for benchmark in benchmarks.benchmarks)
        others = [
            problem.replace("model.policy.model", f"benchmark_eval.models.{name}", 1)
            for name, other in benchmarks.models.items()
            for problem in config_of(model.policy_config, other).problems()
        ]
        return [*model_problems(model, judges), *benchmarks.problems(needed=True), *others]

    def _caption_settings(self, model: BalCapModule, data: CaptionDataModule) -> dict[str, Any]:
        """What captions depend on, but for the images: those of one file are all alike in it."""
        return {
            **identity(model.policy_config, self.checkpoint),
            **{f"model.sampling.{name}": value for name, value in asdict(model.pipeline.sampling).items()},
            "model.predict_temperature": model.predict_temperature,
            "seed_everything": model.pipeline.seed if model.predict_temperature else None,
            "data.prompts": data.settings.prompts,
        }

    def _run_subcommand(self, subcommand: str) -> None:
        mine = subcommand not in NO_RUN and _is_first_rank()
        try:
            with in_use(self.config[subcommand].run_dir) if mine else nullcontext():
                try:
                    if subcommand == "test":
                        self._test()
                    else:
                        super()._run_subcommand(subcommand)
                except BaseException as error:
                    hurry = isinstance(error, SIGTERMException)  # whoever sent it will not wait
                    if subcommand == "fit" and self.trainer.global_step > 0 and not hurry:
                        self._get(self.config_init, "report").write(self.trainer)
                    raise
                finally:
                    if mine:
                        self._say_results(Path(self.config[subcommand].run_dir))
        except SIGTERMException:
            # Its own exit status would be 0, and a scheduler would call the run finished.
            raise SystemExit(128 + signal.SIGTERM) from None
        except RunStopped as stop:
            self._say_why(stop)
        except UserError as error:
            raise SystemExit(f"Error: {error}{next_line(self.given, [str(error)])}") from None

    def _test(self) -> None:
        assert isinstance(self.model, BalCapModule)
        evaluation = self._get(self.config_init, "benchmark_eval")
        run_test(self.trainer, self.model, evaluation, self.checkpoint)
        self._get(self.config_init, "report").write(self.trainer)

    def _say_results(self, run_dir: Path) -> None:
        """One line: where everything is; and one more where little could be learned from."""
        assert isinstance(self.model, BalCapModule)
        if (share := self.model.missing_share) > 0.1:
            print(
                f"Attention: {share:.0%} of the rewards of this run are missing, because judgments failed: it has "
                "learned from the others alone. judge/failed in metrics.csv shows when, rollouts/ what"
            )
        there = ", ".join(name for name in RESULTS if (run_dir / name).exists())
        if there:
            print(f"Results in {run_dir}: {there}", flush=True)

    def _say_why(self, stop: RunStopped) -> None:
        """One message instead of a traceback; exits with 0 when the budget is reached, which is no failure."""
        message = str(stop)
        if self.subcommand == "fit" and self.trainer.global_step > 0:
            message += f". Go on with: --run_dir {self.config[self.subcommand].run_dir} --ckpt_path last"
        if not isinstance(stop, BudgetSpent):
            raise SystemExit(f"Stopped: {message}") from None
        if _is_first_rank():
            print(f"Stopped: {message}", flush=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in NO_RUN:
            launched = subcommand in ("estimate", "plan")
            return kwargs | ({"launch": self.config[subcommand].trainer} if launched else {})
        kwargs["ckpt_path"] = self.checkpoint and str(self.checkpoint)
        kwargs["weights_only"] = True  # a checkpoint is data: it must not run code when it is read
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # they are on disk already
        return kwargs


def _below(name: str) -> Callable[[str], str]:
    def path(run_dir: str) -> str:
        return str(Path(run_dir) / name)

    return path


def _is_first_rank() -> bool:
    """Of the processes of a run, as far as the environment tells before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡 Tip")


def _quieten(in_4bit: bool) -> None:
    """What users cannot act on: how loaders, the model summary and manual optimization are meant here."""
    for message in (
        ".*Using ModelCheckpoint with manual optimization.*",
        r".*module\(s\) in eval mode at the start of training.*",
        ".*is not supported by the model summary.*",
        ".*does not have many workers.*",
        ".*`__len__` method defined.*",
        ".*Starting from v1.9.0, `tensorboardX`.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*barrier.*using the device under current context.*",
        ".*Couldn.t infer the batch indices fetched from your dataloader.*",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    if (
        not in_4bit
    ):  # peft imports bitsandbytes wherever it is installed, which then misses a kernel for 4 bits
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
