"""Images, prompts and references: from files as people have them to `CaptionBatch`.

In the order in which a row meets them::

    settings.py     the settings, which check themselves
    json_files.py   a JSON file -> its rows, as parsed
    layouts.py      one row, in whichever of the usual layouts -> its image, question and captions
    table.py        all rows of a file or hub id -> a memory-mapped table
    columns.py      further keys of the rows, each of one kind: what batches carry as extras
    order.py        which rows take part, which images are held out, and the order of training
    reader.py       one row -> its image from a file inside data.image_root, its prompt and its reference
    images.py       bytes -> upright RGB image, or the cause why not
    bad_rows.py     bad_rows.jsonl: every row that was left out, and why
    stream.py       rows -> full batches, without end, resumable to the exact row; stops at too many bad rows
    datamodule.py   all of it behind one LightningDataModule

A bad row costs one line in bad_rows.jsonl, never the run; too many of them stop it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balcap.data.datamodule import CaptionDataModule

__all__ = ["CaptionDataModule"]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import: only who asks for the data module pays for it.
    if name == "CaptionDataModule":
        from balcap.data.datamodule import CaptionDataModule

        return CaptionDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
