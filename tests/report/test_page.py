"""The page: complete, harmless whatever models and providers write, without secrets, small and quick."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import main
from balcap.report.curves import curves, settings_of
from balcap.report.gallery import add_images, groups, held_out
from balcap.report.page import render
from balcap.report.run import Run
from balcap.report.text import text_filter
from tests.report_runs import write_run

KEY = "pl4nted-Key+with~0123456789"
ODD = (
    "<script>alert(1)</script>",
    "</script><b>bold</b>",
    "a\u202eb\u2066c",
    "\x00\x1b[31m",
    "{{ 7 * 7 }}",
    "&lt;",
)


def body(page: str) -> str:
    """The page without plotly and its own script: what comes from a run."""
    start = page.rindex("<script>", 0, page.index("plotly.js v"))
    return page[:start]


def figures_of(page: str) -> dict[str, dict[str, object]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("odd") / "run", steps=6, failed=0.3, texts=(*ODD, KEY))


def test_texts_are_shown_as_text(odd_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", KEY)
    page = render([Run.read(odd_run)])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    assert "a⟨U+202E⟩b⟨U+2066⟩c" in page
    assert "⟨U+0000⟩⟨U+001B⟩[31m" in page
    assert "{{ 7 * 7 }}" in page  # it is data, never a template
    assert "&amp;lt;" in page
    assert "429 slow down, &lt;b&gt;please&lt;/b&gt;" in page  # the provider's words
    assert KEY not in page
    assert not set("\x00\x1b\u202e\u2066") & set(body(page))


def test_a_lone_surrogate_is_written_out() -> None:
    assert text_filter()("a\ud800b") == "a⟨U+D800⟩b"
    assert text_filter()("שלום 🐕 a\tb\nc") == "שלום 🐕 a\tb\nc"


def test_nothing_is_loaded_from_elsewhere(odd_run: Path) -> None:
    page = body(render([Run.read(odd_run)]))
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\s>\"']+)", page)
    assert len(links) > 20
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert "default-src 'none'" in page
    assert page.count("<img ") == page.count('<img src="data:image/jpeg;base64,') > 0


def test_every_chart_is_one_for_plotly(odd_run: Path) -> None:
    figures = figures_of(render([Run.read(odd_run)]))
    assert len(figures) > 15
    for figure in figures.values():
        go.Figure(figure)  # raises on what Plotly does not know


def test_verdicts_of_assertions_and_units(odd_run: Path) -> None:
    run = Run.read(odd_run)
    cards = held_out([run], 200)
    assert len(cards) == 16
    after = run.rollouts.ends[1]
    assert after is not None
    row = next(row for row in after.rows(range(len(after))) if row["true"] is not None)
    shown = next(card for card in cards if card.sample_id == row["sample_id"]).captions[1]
    expected = [
        ("yes" if points else "vague") if true else "no"
        for true, points in zip(row["true"], row["pointable"], strict=True)
    ]
    assert [verdict for _, verdict in shown.assertions] == expected
    assert [verdict for _, verdict in shown.units] == [
        "yes" if covered else "no" for covered in row["covered"]
    ]
    failed = next(row for row in after.rows(range(len(after))) if row["true"] is None)
    card = next(card for card in cards if card.sample_id == failed["sample_id"])
    assert {verdict for _, verdict in card.captions[1].assertions} == {"unknown"}
    assert (card.unjudged, card.gain, card.captions[1].score) == (True, None, None)


def test_a_selection_keeps_the_extremes(odd_run: Path) -> None:
    run = Run.read(odd_run)
    everything = held_out([run], 200)
    some = held_out([run], 8)
    gains = {card.sample_id: card.gain for card in everything if card.gain is not None}
    chosen = {card.sample_id for card in some}
    assert len(chosen) == len(some) == 8
    assert {max(gains, key=lambda i: gains[i]), min(gains, key=lambda i: gains[i])} <= chosen
    assert max(everything, key=lambda card: card.tokens).sample_id in chosen


def test_groups_are_whole_and_have_their_advantages(odd_run: Path) -> None:
    cards = groups(Run.read(odd_run), 5)
    assert len(cards) == 5
    assert {len(card.captions) for card in cards} == {4}
    assert all(shown.advantage is not None for card in cards for shown in card.captions)
    assert all(card.spread is None or card.spread >= 0 for card in cards)


def test_images_fit_their_share(odd_run: Path) -> None:
    run = Run.read(odd_run)
    whole, small = held_out([run], 16), held_out([run], 16)
    add_images(whole, [run])
    add_images(small, [run], budget=sum(len(card.images[0]) for card in whole) - 1)
    assert all(len(card.images) == 1 for card in (*whole, *small)) or not any(card.images for card in small)
    assert sum(len(uri) for card in small for uri in card.images) < sum(len(card.images[0]) for card in whole)


def test_runs_are_overlaid_by_setting(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / f"seed-{seed}", seed=seed) for seed in range(3)]
    other = write_run(tmp_path / "no-kl", settings={"kl_coef": 0.0})
    settings = settings_of([Run.read(folder) for folder in (*seeds, other)])
    assert [len(setting.runs) for setting in settings] == [3, 1]
    assert settings[0].label == "kl_coef 0.01 (seed-0, seed-1, seed-2)"
    kl = next(figure for figure in curves(settings) if figure["title"] == "KL to the reference")
    bands = [trace for trace in kl["data"] if trace.get("fill") == "tonexty"]
    assert len(bands) == 1  # of the three seeds; a single run has none
    page = render([Run.read(folder) for folder in (*seeds, other)])
    assert "mean change ± standard deviation: kl_coef 0.01 (seed-0, seed-1, seed-2)" in page
    assert page.count("(3 runs)") == 5  # a single run of another setting is in no mean
    assert "after, seed-2" in page  # the same images, side by side


def test_runs_that_hold_out_other_images(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, steps=2, images=20) for name in ("a", "b")]
    for path in (folders[1] / "rollouts").glob("val-*.parquet"):
        table = pq.read_table(path)
        names = pa.array([f"other/{name}" for name in table["sample_id"].to_pylist()])
        pq.write_table(table.set_column(table.column_names.index("sample_id"), "sample_id", names), path)
    cards = held_out([Run.read(folder) for folder in folders], 10)
    assert {card.where for card in cards} == {"a", "b"}
    assert all(len(card.captions) == 2 for card in cards)


@pytest.mark.parametrize(
    "gone", ["metrics.csv", "rollouts", "judge_ledger.sqlite", "benchmarks.json", "config.yaml"]
)
def test_a_run_without_one_of_its_parts(tmp_path: Path, gone: str) -> None:
    folder = write_run(tmp_path / "a", steps=3)
    path = folder / gone
    path.rename(tmp_path / "elsewhere")
    assert "</html>" in render([Run.read(folder)])


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 5}, "model": {}}))
    page = render([Run.read(tmp_path)])
    assert "No metrics were logged" in page
    assert "No captions were logged" in page


def test_a_run_without_b_capscore_says_which_score_it_shows(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=2)
    for path in (folder / "rollouts").glob("*.parquet"):
        names = ["reward/recall", "shaped/recall", "reward/linguistic", "shaped/linguistic"]
        pq.write_table(pq.read_table(path).drop_columns(names), path)
    (folder / "metrics.csv").unlink()
    page = render([Run.read(folder)])
    assert "precision of held-out captions" in page
    assert "The score above a caption is its precision" in page
    assert "b-CapScore" not in body(page)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", steps=2)
    main.main(["report", str(folder), f"{folder}/", f"{folder}/../a"])  # one run, named in three ways
    assert "<h1>Qwen3-VL-4B-Instruct on rows.json</h1>" in (folder / "report.html").read_text()
    assert "</html>" in (folder / "report.html").read_text()
    out = tmp_path / "new/both.html"
    main.main(["report", str(folder), str(write_run(tmp_path / "b", steps=2)), "--out", str(out)])
    assert out.is_file()
    assert f"{out} (" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no run in it"):
        main.main(["report", str(tmp_path)])
    with pytest.raises(SystemExit, match="is a folder"):
        main.main(["report", str(folder), "--out", str(tmp_path)])
