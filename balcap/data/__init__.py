"""Images, prompts and references: from files as people have them to `CaptionBatch`.

What happens to a row, and where::

    sharegpt4v.py   JSON file or hub id -> flat, memory-mapped columns, one pure function per row
    split.py        which rows take part, and which images are held out
    files.py        sample id -> a file inside data.image_root
    images.py       bytes -> upright RGB image, or the cause why not
    prompt.py       what is asked about an image
    stream.py       rows -> full batches, without end, resumable to the exact row
    bad_rows.py     bad_rows.jsonl: every row that was left out, and the limit on their share
    datamodule.py   all of it behind one LightningDataModule

A bad row costs one line in bad_rows.jsonl, never the run; too many of them stop it.
"""

from typing import TYPE_CHECKING, Any

from balcap.data.images import BadImage, decode_image

if TYPE_CHECKING:
    from balcap.data.datamodule import CaptionDataModule

__all__ = ["BadImage", "CaptionDataModule", "decode_image"]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import: only who asks for the data module pays for it.
    if name == "CaptionDataModule":
        from balcap.data.datamodule import CaptionDataModule

        return CaptionDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
