"""`Recaptioner`: what a YAML sets, and what a run writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from balcap.data.images import MAX_PIXELS
from balcap.judge import Judge
from balcap.recaption import checks


@dataclass(frozen=True)
class Files:
    """What a run writes: `out` itself, and beside it what is needed to continue and to look into."""

    out: Path

    @property
    def journal(self) -> Path:
        return self.out.with_name(f"{self.out.name}.journal.jsonl")

    @property
    def quarantine(self) -> Path:
        return self.out.with_name(f"{self.out.name}.quarantine.jsonl")

    @property
    def ledger(self) -> Path:
        return self.out.with_name(f"{self.out.name}.ledger.sqlite")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: exit status: 0 if it is done or the budget is spent, else not 0.
        message: for a person.
        written: rows in `out`; None if it was not written.
        quarantined: rows without a caption that can be used.
        left: rows that the next run asks about.
    """

    status: int
    message: str
    written: int | None
    quarantined: int
    left: int


class Recaptioner:
    """Writes new reference captions for a data set, and what they assert.

    Run it again with the same settings and it goes on where it was, however it ended; rows that have their
    caption are never asked about again. What is written at the end is a ShareGPT4V file in the order of the
    data set.

    Args:
        data: ShareGPT4V rows: path of a ``.json`` or ``.jsonl`` file, or a hub id such as
            ``Lin-Chen/ShareGPT4V``. Rows need an image and may lack a caption.
        image_root: folder that the image paths in the rows start from. Only files below it are read, since
            images are sent to the judge.
        out: the ``.json`` file to write. Beside it lie its journal, from which a run goes on, the list of
            quarantined rows, and the ledger.
        judge: who writes the captions. Its ``ledger`` is kept beside `out` unless it names another.
        name: configuration of a hub data set, such as ``ShareGPT4V``.
        folders: use only images below these folders of `image_root`, such as ``coco/train2017``; null for
            all.
        max_rows: use only the first this many rows that are left after `folders`; null for all. It may be
            raised later: the journal is continued.
        link_targets: folders outside `image_root` that symbolic links in it may lead to.
        max_pixels_in_file: width x height up to which an image is decoded, a guard against decompression
            bombs.
        prompts: instructions, of which every image gets the one that its path and `seed` pick; null for the
            row's own question.
        seed: of the choice among `prompts`.
        decompose: also write what every caption asserts, ``reference_units``, so that training does not pay
            for it.
        decompose_judge: who decomposes, best the judge of the training run; null for `judge`.
        keep_original: keep the caption that is replaced under ``original_caption``.
        retry_quarantined: ask again about rows that an earlier run has put into quarantine.
        partial: write `out` even if rows are left for the next run, without them.
        cache_dir: folder for the table made from the JSON; null for the Hugging Face cache.
    """

    def __init__(
        self,
        data: str | None = None,
        image_root: str | None = None,
        out: str | None = None,
        judge: Judge | None = None,
        name: str | None = None,
        folders: list[str] | None = None,
        max_rows: int | None = None,
        link_targets: list[str] | None = None,
        max_pixels_in_file: int = MAX_PIXELS,
        prompts: list[str] | None = None,
        seed: int = 0,
        decompose: bool = True,
        decompose_judge: Judge | None = None,
        keep_original: bool = True,
        retry_quarantined: bool = False,
        partial: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        self.data = data
        self.image_root = image_root
        self.out = out
        self.judge = judge
        self.name = name
        self.folders = folders
        self.max_rows = max_rows
        self.link_targets = link_targets
        self.max_pixels_in_file = max_pixels_in_file
        self.prompts = prompts
        self.seed = seed
        self.decompose = decompose
        self.decompose_judge = decompose_judge
        self.keep_original = keep_original
        self.retry_quarantined = retry_quarantined
        self.partial = partial
        self.cache_dir = cache_dir
        for one in (judge, decompose_judge):
            if one is not None and one.settings.ledger is None and out is not None:
                one.settings.ledger = str(self.files.ledger)

    @property
    def files(self) -> Files:
        """What is written, and where."""
        return Files(Path(self.out or "").expanduser())

    def problems(self) -> list[str]:
        """What is wrong with the settings, each message with the key to change; empty if all is well."""
        return checks.problems(self)

    def run(self) -> Outcome:
        """Ask about all rows that have not been asked about, then write `out`. Needs sound `problems`.

        Raises:
            DataError: the data set cannot be read.
            JournalError: there is a journal of other settings, or another process writes it.
            StoreError: a cache or ledger of a judge cannot be used.
        """
        from balcap.recaption.run import Run  # reads data and speaks to judges: not for --help

        return Run(self).run()
