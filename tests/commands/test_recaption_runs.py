"""Whole runs of ``main.py recaption`` on the embedded world, in process."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from balcap.judge.images import ImagePolicy, image_url
from examples.shapes.language import is_true, read_fact, read_facts
from examples.shapes.scene import scene_of
from tests.commands.recaption_fakes import FAULTY, FaultyOracle, about

ASK = {"from": "human", "value": "What is this?\n<image>"}


def read(out: Path) -> list[dict]:
    return json.loads(out.read_text())


def quarantine(out: Path) -> list[dict]:
    path = out.with_name(f"{out.name}.quarantine.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cached(cache: Path, task: str) -> int:
    """Answers of a kind that the judge's cache holds."""
    with sqlite3.connect(cache) as answers:
        return answers.execute("SELECT count(*) FROM answers WHERE task = ?", (task,)).fetchone()[0]


def names(world: Path) -> list[str]:
    return [row["image"] for row in read(world / "shapes.json")]


def as_sent(world: Path):
    """Sample id -> the image as the judge gets it."""
    return lambda name: image_url((world / name).read_bytes(), ImagePolicy())


@pytest.fixture(autouse=True)
def _calm() -> None:
    FaultyOracle.reset()


# ---- what is written


def test_every_row_gets_a_true_caption_and_its_units_in_the_order_of_the_rows(
    recaption_arguments, cli, world: Path, out: Path, capsys
) -> None:
    cli(recaption_arguments())
    old, new = read(world / "shapes.json"), read(out)
    assert [row["image"] for row in new] == names(world)
    for before, after in zip(old, new, strict=True):
        caption = after["conversations"][1]["value"]
        scene = scene_of((world / after["image"]).read_bytes())
        assert all(is_true(fact, scene) for fact in read_facts(caption))
        assert [read_fact(unit) for unit in after["reference_units"]] == read_facts(caption)
        assert after["original_caption"] == before["conversations"][1]["value"] != caption
        assert after["conversations"][0] == before["conversations"][0]
        assert (after["id"], after["caption_model"], after["units_model"]) == (
            before["id"],
            "shapes/oracle",
            "shapes/oracle",
        )
    assert not quarantine(out)
    said = capsys.readouterr().out
    assert f"60 of 60 rows are captioned ({out}); $0.00 in this run." in said


def test_a_finished_run_asks_nothing_and_writes_the_same_again(recaption_arguments, cli, out: Path) -> None:
    arguments = recaption_arguments(**FAULTY)
    cli(arguments)
    asked, written = FaultyOracle.asked.copy(), out.read_bytes()
    assert set(asked.values()) == {1}
    out.unlink()
    cli(arguments)
    assert FaultyOracle.asked == asked
    assert out.read_bytes() == written


def test_max_rows_may_be_raised_and_what_is_there_is_not_asked_again(
    recaption_arguments, cli, world: Path, out: Path
) -> None:
    cli(recaption_arguments(**FAULTY, max_rows=10))
    assert [row["image"] for row in read(out)] == names(world)[:10]
    cli(recaption_arguments(**FAULTY, max_rows=25))
    assert [row["image"] for row in read(out)] == names(world)[:25]
    assert sum(count for (task, _), count in FaultyOracle.asked.items() if task == "recaption") == 25
    assert set(FaultyOracle.asked.values()) == {1}
    cli(recaption_arguments(**FAULTY, max_rows=5))  # and lowered
    assert len(read(out)) == 5


def test_chosen_prompts_are_asked_and_written(recaption_arguments, cli, out: Path) -> None:
    prompts = ["Say what you see.", "Caption this."]
    cli(recaption_arguments(**FAULTY, prompts=json.dumps(prompts), max_rows=20))
    humans = [row["conversations"][0]["value"] for row in read(out)]
    assert set(humans) == {f"<image>\n{prompt}" for prompt in prompts}
    asked = [text.partition(" data:")[0] for task, text in FaultyOracle.asked if task == "recaption"]
    assert sorted(f"<image>\n{question}" for question in asked) == sorted(humans)


def test_another_model_may_decompose(recaption_arguments, cli, out: Path) -> None:
    providers = "{faulty: tests.commands.recaption_fakes.FaultyOracle, shapes: examples.shapes.oracle.Oracle}"
    options = {"judge.providers": providers, "judge.per_task": "{decompose: {model: shapes/oracle}}"}
    cli(recaption_arguments(**FAULTY | options, max_rows=6))
    assert {task for task, _ in FaultyOracle.asked} == {"recaption"}
    assert {(row["caption_model"], row["units_model"]) for row in read(out)} == {
        ("faulty/model", "shapes/oracle")
    }
    ledger = sqlite3.connect(out.with_name("new.json.ledger.sqlite"))
    models = dict(ledger.execute("SELECT task, model FROM calls"))
    assert models == {"recaption": "faulty/model", "decompose": "shapes/oracle"}


def test_captions_are_decomposed_several_in_a_call(recaption_arguments, cli, out: Path) -> None:
    cli(recaption_arguments(max_rows=12))
    ledger = sqlite3.connect(out.with_name("new.json.ledger.sqlite"))
    calls = ledger.execute(
        "SELECT task, count(*), sum(items) FROM calls GROUP BY task ORDER BY task"
    ).fetchall()
    assert calls == [("decompose", 3, 12), ("recaption", 12, 12)]


def test_other_readers_of_sharegpt4v_read_it(recaption_arguments, cli, tmp_path: Path, out: Path) -> None:
    import datasets

    cli(recaption_arguments(max_rows=7))
    table = datasets.load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "hf"))
    assert len(table) == 7
    assert {"id", "image", "conversations"} <= set(table.column_names)
    assert [turn["from"] for turn in table[0]["conversations"]] == ["human", "gpt"]


# ---- rows that go wrong


def test_rows_without_captions_or_questions_can_be_captioned(
    recaption_arguments, cli, world: Path, tmp_path: Path, out: Path
) -> None:
    first, second, third = names(world)[:3]
    rows = [
        {"image": first},
        {"image": second, "conversations": [{"from": "human", "value": "What?"}]},
        {"image": third, "reference_units": 5, "conversations": [ASK, {"from": "gpt", "value": "Old."}]},
    ]
    (tmp_path / "bare.json").write_text(json.dumps(rows))
    cli(recaption_arguments(data=tmp_path / "bare.json"))
    assert [row["image"] for row in read(out)] == [first, second, third]
    assert all(row["reference_units"] for row in read(out))


def test_bad_rows_cost_nothing_and_are_listed_with_their_cause(
    recaption_arguments, cli, world: Path, tmp_path: Path, out: Path
) -> None:
    shutil.copytree(world, tmp_path / "spoilt")
    root = tmp_path / "spoilt"
    good = names(world)[:6]
    file = (root / good[0]).read_bytes()
    (root / "shapes/cut.png").write_bytes(file[: len(file) // 2])
    (root / "shapes/text.png").write_text("this is no image")
    Image.new("1", (12_000, 12_000)).save(root / "shapes/bomb.png")
    (tmp_path / "outside.png").write_bytes(file)

    def row(image: object) -> dict:
        return {"id": "1", "image": image, "conversations": [ASK, {"from": "gpt", "value": "A circle."}]}

    bad = {
        1: (row("shapes/missing.png"), "missing_file"),
        3: (row("shapes/cut.png"), "truncated_image"),
        5: (row("shapes/text.png"), "not_an_image"),
        7: (row("shapes/bomb.png"), "decompression_bomb"),
        9: (row("../outside.png"), "outside_image_root"),
        11: (row(good[0]), "duplicate_image"),
        12: (row(None), "no_image_field"),
        13: ("not a row", "malformed_row"),
    }
    rows: list = []
    fresh = iter(good)
    for number in range(14):
        rows.append(bad[number][0] if number in bad else row(next(fresh)))
    rows[11] = row(good[0])
    # Two rows of one image, both without caption: neither is a duplicate yet when the rows are read.
    rows += [{"image": names(world)[10]}, {"image": names(world)[10]}, row("gone/a.png")]
    (root / "rows.json").write_text(json.dumps(rows))
    cli(recaption_arguments(**FAULTY, data=root / "rows.json", image_root=root))
    assert [entry["image"] for entry in read(out)] == [*good, names(world)[10]]
    listed = {entry["row"]: entry["kind"] for entry in quarantine(out)}
    assert listed == {**{number: cause for number, (_, cause) in bad.items()}, 15: "duplicate_image"}
    assert [entry["row"] for entry in quarantine(out)] == sorted(listed)
    assert "data." not in json.dumps(quarantine(out))  # keys as they are named here
    assert sum(task == "recaption" for task, _ in FaultyOracle.asked) == 7

    (root / "shapes/missing.png").write_bytes((root / names(world)[20]).read_bytes())
    cli(recaption_arguments(**FAULTY, data=root / "rows.json", image_root=root))  # repaired
    assert [entry["image"] for entry in read(out)][1] == "shapes/missing.png"
    assert 1 not in {entry["row"] for entry in quarantine(out)}
    assert set(FaultyOracle.asked.values()) == {1}


def test_rows_that_the_judge_will_not_caption_go_into_quarantine(
    recaption_arguments, cli, world: Path, out: Path, capsys
) -> None:
    kinds = {"refusal": "refused", "filter": "filtered", "prose": "invalid", "empty": "invalid",
             "nothing": "no_units", "400": "rejected"}  # fmt: skip
    wrong = dict(zip(names(world)[5:30:4], kinds, strict=False))
    FaultyOracle.reset(about(wrong, as_sent(world)))
    options = {**FAULTY, "judge.max_failed_share": 1}
    cli(recaption_arguments(**options))
    assert [row["image"] for row in read(out)] == [name for name in names(world) if name not in wrong]
    assert {entry["image"]: entry["kind"] for entry in quarantine(out)} == {
        name: kinds[fault] for name, fault in wrong.items()
    }
    assert "54 of 60 rows are captioned" in capsys.readouterr().out
    before = FaultyOracle.asked.copy()

    cli(recaption_arguments(**options))  # they are not asked again
    assert FaultyOracle.asked == before

    FaultyOracle.fault = staticmethod(lambda messages: None)  # until somebody wants it
    cli(recaption_arguments(**options, retry_quarantined="true"))
    again = {item for item, count in FaultyOracle.asked.items() if count > before[item]}
    (empty,) = [name for name, fault in wrong.items() if fault == "nothing"]
    assert [row["image"] for row in read(out)] == [name for name in names(world) if name != empty]
    assert [entry["kind"] for entry in quarantine(out)] == ["no_units"]  # it was answered, and paid for
    assert sum(task == "recaption" for task, _ in again) == 5


def test_a_caption_that_cannot_be_decomposed_is_kept_for_another_try(
    recaption_arguments, cli, world: Path, out: Path
) -> None:
    FaultyOracle.reset(lambda messages: "refusal" if "decompose" in messages[0]["content"][:20] else None)
    options = {**FAULTY, "judge.max_failed_share": 1, "max_rows": 9}
    with pytest.raises(SystemExit) as ended:
        cli(recaption_arguments(**options))
    assert ended.value.code == 1  # nothing to write
    assert not out.exists()
    assert {entry["kind"] for entry in quarantine(out)} == {"refused"}
    assert "decompose:" in quarantine(out)[0]["reason"]
    FaultyOracle.reset()
    cli(recaption_arguments(**options, retry_quarantined="true"))
    assert len(read(out)) == 9
    assert {task for task, _ in FaultyOracle.asked} == {"decompose"}


def test_a_run_begun_anew_forgets_the_quarantine_of_other_settings(
    recaption_arguments, cli, world: Path, out: Path
) -> None:
    FaultyOracle.reset(about({names(world)[2]: "refusal"}, as_sent(world)))
    cli(recaption_arguments(**FAULTY, max_rows=12))
    assert [entry["kind"] for entry in quarantine(out)] == ["refused"]
    FaultyOracle.reset()
    for path in (out, out.with_name(f"{out.name}.settings.json")):
        path.unlink()
    cli(recaption_arguments(**FAULTY, **{"judge.params": "{temperature: 1}"}, max_rows=12))
    assert len(read(out)) == 12
    assert not quarantine(out)


# ---- a provider in trouble


def test_what_may_pass_is_left_for_the_next_run(
    recaption_arguments, cli, world: Path, out: Path, capsys
) -> None:
    wrong = dict.fromkeys(names(world)[3:6], "429")
    FaultyOracle.reset(about(wrong, as_sent(world)))
    options = {**FAULTY, "max_rows": 20}
    with pytest.raises(SystemExit) as ended:
        cli(recaption_arguments(**options))
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "17 of 20 rows are captioned; 3 left for the next run" in said
    assert "limited 3" in said
    assert "--partial true" in said
    assert not out.exists()
    assert not quarantine(out)
    with pytest.raises(SystemExit):
        cli(recaption_arguments(**options, partial="true"))
    assert [row["image"] for row in read(out)] == [n for n in names(world)[:20] if n not in wrong]
    FaultyOracle.reset()
    cli(recaption_arguments(**options))
    assert [row["image"] for row in read(out)] == names(world)[:20]
    assert sum(task == "recaption" for task, _ in FaultyOracle.asked) == 3


def test_a_wrong_key_puts_no_row_into_quarantine(recaption_arguments, cli, out: Path, capsys) -> None:
    FaultyOracle.reset(lambda messages: "401")
    options = {**FAULTY, "max_rows": 5}  # too few to call the judge unavailable
    with pytest.raises(SystemExit) as ended:
        cli(recaption_arguments(**options))
    assert ended.value.code == 1
    assert "no such key" in capsys.readouterr().err
    assert not quarantine(out)
    FaultyOracle.reset()
    cli(recaption_arguments(**options))
    assert len(read(out)) == 5


def test_a_provider_that_is_down_ends_the_run_with_one_message(
    recaption_arguments, cli, server, over_http, tmp_path: Path, out: Path, capsys
) -> None:
    server.down_after = 30
    with pytest.raises(SystemExit) as ended:
        cli(recaption_arguments(**over_http))
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "the judge is not available" in said
    assert "model.judge" not in said  # the keys are those of this command
    assert not out.exists()
    assert not quarantine(out)
    assert 0 < cached(tmp_path / "judge.sqlite", "recaption") <= 30
    answered = {record["sha256"] for record in server.records if record["answered"]}
    server.down_after = None
    cli(recaption_arguments(**over_http))
    assert len(read(out)) == 60
    twice = [r["sha256"] for r in server.records if r["answered"] and r["sha256"] in answered]
    assert len(twice) == len(answered)  # none of them came again


def test_trouble_of_every_sort_costs_no_row(recaption_arguments, cli, server, over_http, out: Path) -> None:
    server.fault_share, server.seed = 0.3, 2
    server.faults = ("429", "500", "503", "reset", "truncated", "prose", "short", "unknown_id", "html")
    options = {**over_http, "judge.retries": 8, "judge.max_failed_share": 1}
    cli(recaption_arguments(**options, max_rows=30))
    assert len(read(out)) == 30
    assert not quarantine(out)


def test_the_budget_ends_the_run_and_a_larger_one_continues_it(
    recaption_arguments, cli, world: Path, tmp_path: Path, out: Path, capsys
) -> None:
    price = json.dumps({"faulty/model": {"input": 10.0, "output": 100.0}})
    options = {**FAULTY, "judge.prices": price, "judge.budget_usd": 0.2}
    cli(recaption_arguments(**options))  # returns: a spent budget is no error
    said = capsys.readouterr().out
    assert "judge.budget_usd: $0.2" in said
    assert "model.judge" not in said
    assert "The same command goes on from here" in said
    assert not out.exists()
    ledger = sqlite3.connect(out.with_name("new.json.ledger.sqlite"))
    spent, dearest = ledger.execute("SELECT sum(usd), max(usd) FROM calls").fetchone()
    assert 0.2 <= spent <= 0.2 + 4 * dearest  # four calls at once
    assert 0 < cached(tmp_path / "judge.sqlite", "recaption") < 60
    cli(recaption_arguments(**options))  # it is the budget of the whole job, not of a process
    assert ledger.execute("SELECT sum(usd) FROM calls").fetchone()[0] == spent
    cli(recaption_arguments(**{**options, "judge.budget_usd": 5}))
    assert [row["image"] for row in read(out)] == names(world)
    assert set(FaultyOracle.asked.values()) == {1}


# ---- settings


def test_all_problems_are_reported_at_once_and_nothing_is_touched(
    recaption_arguments, cli, world: Path, out: Path, monkeypatch
) -> None:
    from balcap.cli import ConfigError

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError) as refused:
        cli(
            recaption_arguments(
                data="no/such/file.json",
                image_root="/no/such/folder",
                out="captions.txt",
                max_rows=0,
                prompts='[" "]',
                seed=-1,
                max_pixels_in_file=0,
                **{
                    "judge.model": "openai/gpt-5-mini",
                    "judge.concurrency": 0,
                    "judge.per_task": "{decompose: {model: nowhere/model}}",
                },
            )
        )
    keys = [problem.split()[0].rstrip(":") for problem in refused.value.problems]
    assert sorted(keys) == sorted(
        ["data", "image_root", "out", "max_rows", "prompts", "seed", "max_pixels_in_file", "judge.model",
         "judge.concurrency", "judge.per_task.decompose.model"]
    )  # fmt: skip
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"data": None}, "data is required"),
        ({"image_root": None}, "image_root is required"),
        ({"out": None}, "out is required"),
        ({"folders": "[nowhere]"}, "folders: nowhere does not exist under image_root="),
        ({"judge.cache": "null"}, "judge.cache must be a file"),
    ],
)
def test_what_is_missing_is_named(recaption_arguments, cli, options: dict, key: str) -> None:
    from balcap.cli import ConfigError

    arguments = [a for a in recaption_arguments(**options) if not a.endswith("recaption_shapes.yaml")]
    arguments.remove("--config")
    arguments += [
        "--judge.providers",
        "{shapes: examples.shapes.oracle.Oracle}",
        "--judge.model",
        "shapes/oracle",
    ]
    with pytest.raises(ConfigError) as refused:
        cli(arguments)
    assert [p for p in refused.value.problems if p.startswith(key)] == refused.value.problems


def test_it_writes_over_nothing_that_it_has_not_written(
    recaption_arguments, cli, world: Path, out: Path
) -> None:
    from balcap.cli import ConfigError

    out.parent.mkdir()
    out.write_text("precious")
    with pytest.raises(ConfigError, match="was not written by recaption"):
        cli(recaption_arguments())
    assert out.read_text() == "precious"
    data = (world / "shapes.json").read_bytes()
    with pytest.raises(ConfigError, match="is the data set itself"):
        cli(recaption_arguments(out=world / "shapes" / ".." / "shapes.json"))
    assert (world / "shapes.json").read_bytes() == data


def test_other_settings_than_those_of_an_earlier_run_are_refused(
    recaption_arguments, cli, tmp_path: Path, out: Path
) -> None:
    from balcap.cli import ConfigError

    cli(recaption_arguments(max_rows=3))
    before = out.read_bytes()
    options = {"judge.params": "{temperature: 1}", "judge.cache": tmp_path / "other.sqlite"}
    with pytest.raises(ConfigError) as refused:
        cli(recaption_arguments(max_rows=3, **options))
    text = str(refused.value)
    assert f'judge.cache was "{tmp_path / "judge.sqlite"}", is "{tmp_path / "other.sqlite"}"' in text
    for task in ("recaption", "decompose"):
        asked = '[{"model": "shapes/oracle", "params": %s}]'
        was, now = asked % "{}", asked % '{"temperature": 1}'
        assert f"judge ({task}) was {was}, is {now}" in text
    assert "Set them back" in text
    assert out.read_bytes() == before
    cli(
        recaption_arguments(max_rows=3, **{"judge.concurrency": 9, "judge.timeout_s": 7})
    )  # matters to no answer


def test_a_data_set_without_a_folder_is_refused(recaption_arguments, cli, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "elsewhere/a.png"}]))
    with pytest.raises(SystemExit, match=r"^image_root: no row of .* is left: elsewhere not found"):
        cli(recaption_arguments(data=tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text("no JSON")
    with pytest.raises(SystemExit, match=r"^data: .* expected a JSON array"):
        cli(recaption_arguments(data=tmp_path / "rows.json"))


def test_a_data_set_that_changes_under_the_run_is_noticed(
    recaption_arguments, cli, world: Path, tmp_path: Path, out: Path
) -> None:
    data = tmp_path / "rows.json"
    rows = read(world / "shapes.json")[:4]
    data.write_text(json.dumps(rows))

    def change(messages) -> None:
        data.write_text(json.dumps(rows[::-1]))

    FaultyOracle.reset(change)
    with pytest.raises(SystemExit, match=r"^data: .* has changed while the judge was asked about its rows"):
        cli(recaption_arguments(**FAULTY, data=data))
    assert not out.exists()
    data.write_text(json.dumps(rows))
    before = FaultyOracle.asked.copy()
    cli(recaption_arguments(**FAULTY, data=data))
    assert [row["image"] for row in read(out)] == names(world)[:4]
    assert FaultyOracle.asked == before


def test_few_images_are_in_memory_at_once(recaption_arguments, cli, monkeypatch) -> None:
    from balcap.commands.recaption_run import RecaptionRun

    held, most = [0], [0]
    original = RecaptionRun._caption

    async def counted(self, row: int):
        held[0] += 1
        most[0] = max(most[0], held[0])
        try:
            return await original(self, row)
        finally:
            held[0] -= 1

    monkeypatch.setattr(RecaptionRun, "_caption", counted)
    cli(recaption_arguments())
    assert 4 <= most[0] <= 8  # twice as many as calls at once
