"""Order, sharding, full batches and exact resumption."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from balcap.data.bad_rows import BadRowLog, TooManyBadRows
from balcap.data.layouts import flat_row
from balcap.data.order import (
    common_position,
    permutation,
    positions_from,
    read_order,
    rows_per_epoch,
    select_rows,
    split_rows,
)
from balcap.data.reader import ImageFolder, RowReader
from balcap.data.settings import DataSettings
from balcap.data.stream import CaptionStream, PlannedBatches, StreamLoader, even_chunks
from balcap.data.table import Table
from balcap.types import CaptionBatch

IMAGE = Image.new("RGB", (28, 28))


class FakeFolder(ImageFolder):
    """Every name is an image; no disk."""

    def locate(self, name: str) -> Path:
        return Path(name)

    def load(self, path: Path) -> tuple[bytes, Image.Image]:
        return path.name.encode(), IMAGE


def make_reader(rows: int, bad: set[int], folder: Path) -> RowReader:
    table = [
        flat_row(
            i,
            sample_id=f"{i}.png",
            question="What?",
            captions=[f"caption {i}"],
            columns={"reference_units": f'["unit {i}"]' if i % 2 else None},
            problem="no_caption" if i in bad else "",
        )
        for i in range(rows)
    ]
    return RowReader(Table.of(table), FakeFolder(folder), DataSettings(), BadRowLog(folder))


def make_stream(
    folder: Path,
    rows: int = 23,
    bad: set[int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> CaptionStream:
    settings = DataSettings(**{"num_workers": 0, "max_bad_share": 1.0, **options})
    return CaptionStream(make_reader(rows, bad or set(), folder), np.arange(rows), settings, rank, world_size)


def train(stream: CaptionStream, batches: int, workers: int = 0) -> list[CaptionBatch]:
    """As Lightning does: one loader pass after another, each batch handed back once it is trained on."""
    done: list[CaptionBatch] = []
    while len(done) < batches:
        for batch in islice(StreamLoader(stream, batch_size=None, num_workers=workers), batches - len(done)):
            done.append(batch)
            assert batch.cursor is not None
            stream.consumed(batch.cursor)
    return done


def ids(batches: list[CaptionBatch]) -> list[str]:
    return [i for batch in batches for i in batch.sample_ids]


# ---- order


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_deals_every_row_to_exactly_one_shard(rows: int, shards: int, epoch: int) -> None:
    dealt: Counter[int] = Counter()
    for shard in range(shards):
        count = rows_per_epoch(rows, shards, shard)
        dealt.update(islice(read_order(rows, 5, shards, shard, epoch * count), count))
    expected = shards if rows < shards else 1  # too few to deal out: every shard reads all
    assert dealt == dict.fromkeys(range(rows), expected)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 100), st.data())
def test_a_position_says_all_that_is_needed_to_continue(
    rows: int, shards: int, stop: int, data: st.DataObject
) -> None:
    shard = data.draw(st.integers(0, shards - 1))
    whole = list(islice(read_order(rows, 1, shards, shard, 0), stop + 30))
    assert list(islice(read_order(rows, 1, shards, shard, stop), 30)) == whole[stop:]


def test_epochs_and_seeds_have_their_own_order() -> None:
    assert sorted(permutation(50, 0, 0)) == list(range(50))
    assert list(permutation(50, 0, 0)) == list(permutation(50, 0, 0))
    assert list(permutation(50, 0, 0)) != list(permutation(50, 0, 1))
    assert list(permutation(50, 0, 0)) != list(permutation(50, 1, 0))


@given(st.integers(8, 60), st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 8))
def test_another_number_of_shards_leaves_no_row_out(rows: int, positions: list[int], shards: int) -> None:
    place = common_position(rows, positions)
    before = {
        (epoch, int(row))
        for epoch in range(place // rows + 1)
        for row in permutation(rows, 0, epoch)[: max(0, place - epoch * rows)]
    }
    read = set()
    for shard, position in enumerate(positions):
        per_epoch = rows_per_epoch(rows, len(positions), shard)
        order = islice(read_order(rows, 0, len(positions), shard, 0), position)
        read |= {(i // per_epoch, row) for i, row in enumerate(order)}
    assert before <= read  # whatever lies before the common place was trained on
    for shard, position in enumerate(positions_from(rows, shards, place)):
        per_epoch = rows_per_epoch(rows, shards, shard)
        skipped = islice(read_order(rows, 0, shards, shard, 0), position)
        assert {(i // per_epoch, row) for i, row in enumerate(skipped)} <= before  # nothing else is skipped


# ---- the stream


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_ranks_cover_all_rows_exactly_once_per_epoch(tmp_path: Path, world_size: int, workers: int) -> None:
    seen: Counter[str] = Counter()
    for rank in range(world_size):
        stream = make_stream(
            tmp_path, rows=48, batch_size=2, rank=rank, world_size=world_size, num_workers=workers
        )
        assert len(stream) == 24 // world_size
        seen.update(ids(train(stream, 2 * len(stream), workers)))
    assert seen == {f"{i}.png": 2 for i in range(48)}


def test_batches_are_full_and_skip_bad_rows(tmp_path: Path) -> None:
    bad = {0, 3, 4, 11, 19}
    stream = make_stream(tmp_path, bad=bad, batch_size=4)
    batches = train(stream, 20)
    assert {len(b) for b in batches} == {4}
    assert not set(ids(batches)) & {f"{i}.png" for i in bad}
    assert BadRowLog(tmp_path).counts() == {"no_caption": 5}  # met in four epochs, listed once
    assert batches[0].references[0] == f"caption {batches[0].sample_ids[0][:-4]}"
    assert batches[0].prompts == ["What?"] * 4
    assert batches[0].image_bytes[0] == (batches[0].sample_ids[0].encode(),)


@given(
    rows=st.integers(3, 30),
    bad_share=st.sampled_from([0.0, 0.4]),
    batch_size=st.integers(1, 5),
    shards=st.integers(1, 3),
    stop=st.integers(0, 25),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_a_stopped_stream_continues_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int, bad_share: float, batch_size: int, shards: int, stop: int, seed: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("stream")
    bad = set(range(1, rows, 2)) if bad_share else set()

    def new() -> CaptionStream:
        return make_stream(folder, rows, bad, batch_size=batch_size, seed=seed, num_workers=shards)

    # One worker after another, each its turn, in this process: the order in which a DataLoader asks them.
    def play(stream: CaptionStream, batches: int) -> list[str]:
        result: list[CaptionBatch] = []
        while len(result) < batches:
            result += islice(in_turns(stream), batches - len(result))
            assert result[-1].cursor is not None
            for batch in result:
                stream.consumed(batch.cursor)  # type: ignore[arg-type]
        return ids(result)

    uninterrupted = play(new(), stop + 12)
    first = new()
    begun = play(first, stop) if stop else []
    second = new()
    second.positions, second.batches = list(first.positions), first.batches
    assert begun + play(second, 12) == uninterrupted


def in_turns(stream: CaptionStream) -> list[CaptionBatch]:
    """One pass of a `DataLoader` with as many workers as the stream has shards, without processes."""
    import balcap.data.stream as module

    class Info:
        def __init__(self, worker: int) -> None:
            self.id = worker

    parts = []
    original = module.get_worker_info
    try:
        for worker in range(stream.workers):
            module.get_worker_info = lambda worker=worker: Info(worker)  # type: ignore[assignment, misc]
            parts.append(list(stream))
    finally:
        module.get_worker_info = original
    return [parts[b % stream.workers][b // stream.workers] for b in range(len(stream))]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_waits_is_read_once_in_this_process_and_again_after_a_resume(
    tmp_path: Path, workers: int
) -> None:
    """As with a lag: at the end of each pass one batch has been taken and not been consumed."""
    new = {"rows": 12, "bad": set(), "batch_size": 3, "num_workers": workers}
    stream = make_stream(tmp_path, **new)
    read: list[CaptionBatch] = []
    for _ in range(3):
        for batch in StreamLoader(stream, batch_size=None, num_workers=workers):
            assert batch.cursor is not None
            stream.taken(batch.cursor)
            if read and read[-1].cursor is not None:
                stream.consumed(read[-1].cursor)
            read.append(batch)
    assert ids(read) == ids(train(make_stream(tmp_path, **new), 12, workers))
    resumed = make_stream(tmp_path, **new)
    resumed.restore(stream.state())
    assert ids(train(resumed, 1, workers)) == ids(read[-1:])


@pytest.mark.parametrize(("workers", "stop"), [(0, 4), (1, 7), (2, 1), (2, 4), (3, 7)])
def test_batches_that_workers_prefetched_are_not_lost(tmp_path: Path, workers: int, stop: int) -> None:
    bad = {2, 9, 10}
    new = {"rows": 23, "bad": bad, "batch_size": 3, "num_workers": workers}
    uninterrupted = ids(train(make_stream(tmp_path, **new), 12, workers))
    first = make_stream(tmp_path, **new)
    begun = ids(train(first, stop, workers))  # the loader is dropped with what its workers had prepared
    second = make_stream(tmp_path, **new)
    second.positions, second.batches = list(first.positions), first.batches
    assert begun + ids(train(second, 12 - stop, workers)) == uninterrupted


# ---- too many bad rows


@pytest.mark.parametrize("workers", [0, 2])
def test_a_share_of_bad_rows_that_is_too_high_stops_with_counts_and_path(
    tmp_path: Path, workers: int
) -> None:
    bad = set(range(0, 200, 2))
    stream = make_stream(tmp_path, 200, bad, batch_size=4, num_workers=workers, max_bad_share=0.3)
    with pytest.raises(TooManyBadRows) as caught:
        train(stream, 100, workers)
    message = str(caught.value)
    assert "data.max_bad_share=0.3" in message
    assert "(no_caption " in message
    assert str(tmp_path / "bad_rows.jsonl") in message
    assert "Traceback" not in message
    read, counted = stream.rows_read()
    assert read >= 50
    assert counted > 0.3 * read


def test_a_share_within_the_limit_and_few_rows_do_not_stop(tmp_path: Path) -> None:
    tolerant = make_stream(tmp_path, 200, set(range(0, 200, 2)), batch_size=4, max_bad_share=0.6)
    assert len(train(tolerant, 60)) == 60
    short = make_stream(tmp_path, 40, set(range(0, 40, 2)), batch_size=4, max_bad_share=0.1)
    assert len(train(short, 3)) == 3


@pytest.mark.parametrize("rows", [1, 5])
def test_only_bad_rows_end_in_an_error_instead_of_searching_for_ever(tmp_path: Path, rows: int) -> None:
    stream = make_stream(tmp_path, rows, set(range(rows)), batch_size=2)
    with pytest.raises(TooManyBadRows, match="none of the 1000 rows read so far can be used"):
        train(stream, 1)


def test_skipped_rows_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(make_stream(tmp_path, 20, {1, 2, 3, 4, 5}, batch_size=2), 20)
    assert "skipped" in caplog.text
    assert "(no_caption 5), listed in" in caplog.text
    assert len(caplog.records) <= 4


# ---- planned batches


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 7))
def test_even_chunks_cover_all_rows_once_with_equal_numbers_of_batches(
    rows: int, world: int, size: int
) -> None:
    chunks = [even_chunks(np.arange(rows), rank, world, size) for rank in range(world)]
    assert sorted(int(r) for rank in chunks for chunk in rank for r in chunk) == list(range(rows))
    assert all(1 <= len(chunk) <= size for rank in chunks for chunk in rank)
    numbers = [len(rank) for rank in chunks]
    largest = -(-rows // world)
    assert max(numbers) == -(-largest // size)
    if rows // world >= max(numbers):
        assert len(set(numbers)) == 1


def test_bad_planned_rows_are_replaced_by_spares(tmp_path: Path) -> None:
    reader = make_reader(12, {1, 2, 9}, tmp_path)
    planned = PlannedBatches(reader, [np.array([0, 1]), np.array([2, 3])], spares=np.array([9, 10]))
    batches = list(planned)
    # 1 -> spare 9, bad too -> spare 10; 2 finds no spare left.
    assert [b.sample_ids for b in batches] == [["0.png", "10.png"], ["3.png"]]
    assert ids(list(planned)) == ids(batches)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_planned_batches_keep_their_order_over_workers(tmp_path: Path, workers: int) -> None:
    planned = PlannedBatches(make_reader(9, set(), tmp_path), np.array_split(np.arange(9), 5))
    loader = StreamLoader(planned, batch_size=None, num_workers=workers)
    assert len(loader) == 5
    assert ids(list(loader)) == [f"{i}.png" for i in range(9)]


# ---- split


names = st.lists(st.text("abcdef", min_size=1, max_size=5), min_size=4, max_size=30, unique=True)


@given(names, st.integers(0, 9), st.integers(1, 3), st.data())
def test_the_split_depends_on_the_images_alone(
    ids: list[str], seed: int, val_size: int, data: st.DataObject
) -> None:
    def held_out(order: list[str]) -> tuple[list[str], list[str], list[str]]:
        split = split_rows(np.arange(len(order)), order, [""] * len(order), seed, val_size)
        parts = [[order[i] for i in part] for part in (split.train, split.val, split.spare)]
        assert sorted(i for part in parts for i in part) == sorted(order)
        return tuple(parts)

    train_ids, val, spare = held_out(ids)
    assert len(val) == val_size
    assert len(spare) == 1  # one for every eight, rounded up
    assert held_out(data.draw(st.permutations(ids)))[1:] == (val, spare)
    added = held_out([*ids, "x1", "x2"])
    assert not set(train_ids) & set(added[1] + added[2])  # no training image is ever validated on
    removed = [i for i in ids if i != data.draw(st.sampled_from(ids))]
    if len(removed) > val_size:
        assert not set(val + spare) & set(held_out(removed)[0])  # and no held-out image trained on


def test_rows_with_a_malformed_column_change_nothing_but_come_last_of_what_is_held_out() -> None:
    ids = [str(i) for i in range(20)]
    good = split_rows(np.arange(20), ids, [""] * 20, 0, 4)
    held_out = [*good.val, *good.spare]
    causes = ["malformed_column" if i == held_out[1] else "" for i in range(20)]
    now = split_rows(np.arange(20), ids, causes, 0, 4)
    assert now.train.tolist() == good.train.tolist()
    assert [*now.val, *now.spare] == [held_out[0], *held_out[2:], held_out[1]]


def test_bad_rows_are_never_held_out() -> None:
    split = split_rows(np.arange(6), [f"{i}" for i in range(6)], ["", "no_caption", "", "", "", ""], 0, 4)
    assert 1 in split.train
    assert len(split.val) == 4
    assert len(split_rows(np.arange(6), ["a"] * 6, [""] * 6, 0, 0).train) == 6


def test_folders_on_disk_and_asked_for_take_part(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    ids = [
        "coco/a/1.png",
        "sam/2.png",
        "coco/b/3.png",
        "",
        "4.png",
        "../5.png",
        "sam/6.png",
        "/etc/7.png",
        "coco/ab/8.png",
    ]
    rows, missing = select_rows(ids, tmp_path, None, None)
    assert [ids[r] for r in rows] == [
        "coco/a/1.png",
        "coco/b/3.png",
        "",
        "4.png",
        "../5.png",
        "/etc/7.png",
        "coco/ab/8.png",
    ]
    assert missing == {"sam": 2}
    assert [ids[r] for r in select_rows(ids, tmp_path, ["coco/a/"], None)[0]] == ["coco/a/1.png"]
    assert [ids[r] for r in select_rows(ids, tmp_path, None, 2)[0]] == ["coco/a/1.png", "coco/b/3.png"]
