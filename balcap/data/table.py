"""A data set, local or from the hub -> a memory-mapped table with one flat row per row of the file.

The table is an Arrow file in a cache, keyed on the content of what it was made from. `balcap.data.layouts` describes
its columns; further keys that `data.columns` names are kept as they are, see `balcap.data.columns`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from balcap.data.columns import MALFORMED_COLUMN, Columns
from balcap.data.json_files import DataError, parse_rows
from balcap.data.layouts import NO_CAPTION, flat_row, normalise
from balcap.utils.files import atomic_write

TEXT_ONLY_CAUSES = frozenset((NO_CAPTION, MALFORMED_COLUMN))
"""Causes that do not matter to who only needs the image."""

_FORMAT = 5
"""Part of the cache's key: raise it when `flat_rows` answers differently."""

_CHUNK = 20_000


class Table(Sequence[dict[str, Any]]):
    """Rows as `flat_rows` makes them.

    Args:
        data: the columns.
        path: of the Arrow file that they are mapped from, if any: what another process opens for itself.
    """

    def __init__(self, data: pa.Table, path: str | None = None) -> None:
        self.data, self.path = data, path

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]], columns: Collection[str] = ()) -> Table:
        """In memory."""
        return cls(pa.Table.from_pylist(list(rows), _schema(Columns(columns).names)))

    @classmethod
    def open(cls, path: str) -> Table:
        """Mapped from its file."""
        return cls(pa.ipc.open_file(pa.memory_map(path)).read_all(), path)

    def __reduce__(self) -> Any:
        return (Table.open, (self.path,)) if self.path else (Table, (self.data,))

    def __len__(self) -> int:
        return self.data.num_rows

    def __getitem__(self, index: Any) -> Any:
        return self.data.slice(int(index), 1).to_pylist()[0]

    def column(self, name: str) -> list[Any]:
        """One column: much faster than row by row."""
        return self.data.column(name).to_pylist()

    def same_image(self, index: int) -> list[int]:
        """The good rows of the image (or images) of row `index`, itself among them, in the order of the file."""
        first, order = self._by_image
        start, end = np.searchsorted(first, [index, index + 1])
        return [int(row) for row in order[start:end]] or [index]

    @cached_property
    def _by_image(self) -> tuple[np.ndarray, np.ndarray]:
        first = self.data.column("first").to_numpy()
        order = np.argsort(first, kind="stable")
        return first[order], order


def _schema(columns: Iterable[str]) -> pa.Schema:
    text, integer = pa.string(), pa.int64()
    fields = dict.fromkeys(flat_row(0), text) | {"row": integer, "first": integer, "captions": pa.list_(text)}
    fields["columns"] = pa.struct([(name, text) for name in columns])
    return pa.schema(list(fields.items()))


def flat_rows(raw_rows: Iterable[Any], columns: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Normalised rows with their columns, and with ``first``, the number of the first good row of the same image.

    Besides the causes of `normalise`, a row with a column of another kind than before is bad, ``malformed_column``.

    Raises:
        DataError: after the last row, if no row had one of the `columns`.
    """
    first: dict[str, int] = {}
    taken = Columns(columns)
    for row, raw in enumerate(raw_rows):
        flat = normalise(raw, row)
        usable = not flat["problem"] or flat["problem"] in TEXT_ONLY_CAUSES
        flat["columns"], malformed = taken.take(raw if usable else {}, row)
        if malformed and not flat["problem"]:
            flat |= {"problem": MALFORMED_COLUMN, "detail": malformed}
        if not flat["problem"]:
            flat["first"] = first.setdefault(flat["sample_id"], row)
        yield flat
    if taken.unseen:
        raise DataError(taken.unseen_message())


@dataclass(frozen=True)
class RowFile:
    """The rows of a file, as `parse_rows` reads them."""

    path: str

    def __iter__(self) -> Iterator[Any]:
        return parse_rows(self.path)


def raw_rows(data: str, name: str | None = None, cache_dir: str | None = None) -> tuple[Iterable[Any], str]:
    """The rows that `load_rows` makes a table of, as parsed and in the same order, and the same digest.

    Raises:
        DataError: as `load_rows`; for a file that breaks off, not before its rows are read.
    """
    path = Path(data).expanduser()
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return RowFile(str(path)), hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data.data: cannot read {path}: {error.strerror}") from error
    import datasets

    try:
        rows = datasets.load_dataset(data, name, split="train", cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.data: no file {data!r} here, and as a hub data set (data.name={name}) it fails to load: "
            f"{error}. Without a network, download the JSON file elsewhere and give its path."
        ) from error
    return rows, rows._fingerprint


def load_rows(
    data: str, name: str | None = None, cache_dir: str | None = None, columns: Collection[str] = ()
) -> tuple[Table, str]:
    """The data set as a memory-mapped table of the rows of `flat_rows`.

    The table is written once into the cache, under a lock, by whichever process comes first.

    Args:
        data: path of a ``.json`` or ``.jsonl`` file, or a hub id such as ``Lin-Chen/ShareGPT4V``.
        name: configuration on the hub, such as ``ShareGPT4V``.
        cache_dir: folder of the cache; None for ``balcap`` in Hugging Face's own (``HF_DATASETS_CACHE``).
        columns: further keys of the rows to keep, besides ``reference_units``.

    Returns:
        The table, and a digest of the content it was made from.

    Raises:
        DataError: the file or hub data set cannot be read, or no row has one of the columns.
    """
    rows, digest = raw_rows(data, name, cache_dir)
    folder = Path(cache_dir or _hub_cache()).expanduser()
    key = hashlib.sha256(repr((digest, sorted(set(columns)), _FORMAT)).encode()).hexdigest()[:32]
    path = folder / f"rows-{key}.arrow"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    _write(path, flat_rows(rows, columns), _schema(Columns(columns).names))
    except OSError as error:
        raise DataError(
            f"data.cache_dir: cannot write to {error.filename or folder} ({error.strerror}); name a "
            "folder that you may write to and that has room"
        ) from error
    return Table.open(str(path)), digest


def _write(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    with atomic_write(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))


def _hub_cache() -> str:
    import datasets

    return f"{datasets.config.HF_DATASETS_CACHE}/balcap"
