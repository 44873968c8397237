"""Benchmarks in the authors' own words: prompts from their file, answers as text, tries as their code makes them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from balcap.benchmarks import CapArena, CaptionQA, DCScore
from balcap.benchmarks.base import Benchmark
from balcap.benchmarks.official import read_prompts
from balcap.judge import Judge, Reply
from balcap.judge.client import CallFailed

THEIRS = '''
extract_prompt = \\
"""
Facts of it: [{{"fact": ...}}]
{caption}"""
match_prompt = "Match {predicted_atomic_facts} with {oracle_atomic_facts}"
verify_prompt = "Verify {atomic_facts} by {reference_caption}"
system_prompt_with_ref = "You prefer. {not a field}"
def evaluate(with_ref, caption_1, caption_2, caption_ref):
    system_prompt = "One letter."
    if with_ref:
        compare_prompt = f"1: {caption_1} 2: {caption_2} Ref: {caption_ref} {{}}"
    else:
        compare_prompt = f"1: {caption_1} 2: {caption_2}"
raise SystemExit("it is never run")
'''


class ScriptedJudge(Judge):
    """Answers each kind of question from a function of its messages, and keeps what it was asked."""

    def __init__(self, answers: dict[str, Callable[[str], str | None]]) -> None:
        several = {"dcscore_match": 3, "dcscore_verify": 3}  # they hold one all the same
        super().__init__("openai/gpt-4o-mini", cache=None, retries=0, max_failed_share=1.0, per_call=several)
        self.answers = answers
        self.asked: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def make_client(self) -> Any:
        return self

    def connect(self) -> None:
        pass

    async def close(self) -> None:  # type: ignore[override]
        pass

    async def call(self, question: Any, route: Any, messages: Any, timeout_s: float) -> Reply:
        name = question.task.name
        self.asked[name].append((messages, dict(route.params)))
        content = messages[1]["content"]
        text = self.answers[name](next(part["text"] for part in content if part["type"] == "text"))
        if text is None:
            raise CallFailed("server", "it fails")
        return Reply(text)


@pytest.fixture
def code(tmp_path: Path) -> str:
    path = tmp_path / "theirs.py"
    path.write_text(THEIRS)
    return str(path)


def judged(benchmark: Benchmark, judge: ScriptedJudge, caption: str) -> dict[str, Any]:
    """The record of the benchmark's first image."""
    try:
        return judge.run(benchmark.judge_caption(judge, benchmark.images()[0], caption))
    finally:
        Judge.close(judge)


def data_file(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_prompts_are_read_and_nothing_is_run(code: str) -> None:
    prompts = read_prompts(code, "extract_prompt", "compare_prompt", "system_prompt")
    assert prompts["extract_prompt"].format(caption="{A}") == '\nFacts of it: [{"fact": ...}]\n{A}'
    given = {"caption_1": "a", "caption_2": "b", "caption_ref": "c"}
    assert prompts["compare_prompt"].format(**given) == "1: a 2: b Ref: c {}"
    assert prompts["system_prompt"] == "One letter."
    with pytest.raises(ValueError, match=r"code: .* defines no text other_prompt"):
        read_prompts(code, "other_prompt")
    with pytest.raises(ValueError, match=r"code: /no/such\.py cannot be read"):
        read_prompts("/no/such.py", "x")


FACTS = [{"fact": "A dog.", "relevance": 1}, {"fact": "It is calm.", "relevance": 0}]
SHOWN = [{"fact": "A dog."}, {"fact": "It is calm."}]


def fenced(rows: Any) -> str:
    return f"Sure:\n```json\n{json.dumps(rows)}\n```"


@pytest.fixture
def dcscore(code: str, tmp_path: Path, png: Path) -> DCScore:
    row = {"image_name": png.name, "oracle_caption": "A brown dog.", "oracle_facts": ["a dog", "it is brown"]}
    data = data_file(tmp_path / "facts.json", [row])
    return DCScore(data=data, image_root=str(png.parent), official=True, code=code)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


def test_dcscore_asks_once_three_times_and_three_times_with_the_image(dcscore: DCScore) -> None:
    judge = ScriptedJudge(
        {
            "dcscore_extract": lambda text: fenced(FACTS),
            "dcscore_match": lambda text: fenced(
                [{**SHOWN[0], "matched_oracle_id": 0}, {**SHOWN[1], "matched_oracle_id": "None"}]
            ),
            "dcscore_verify": lambda text: fenced(
                [{**SHOWN[0], "verification": 1}, {**SHOWN[1], "verification": 0}]
            ),
        }
    )
    record = judged(dcscore, judge, "A calm dog.")
    # all: precision 1 / 2, recall 1 / 2; relevant: precision 1, recall 1 / 2
    assert record["score"] == pytest.approx((0.5 + 2 / 3) / 2, abs=1e-7)
    assert (record["trials"], record["failed"]) == (9, 0)
    assert {name: len(calls) for name, calls in judge.asked.items()} == {
        "dcscore_extract": 1,
        "dcscore_match": 3,
        "dcscore_verify": 3,
    }
    (messages, params) = judge.asked["dcscore_verify"][0]
    assert [part["type"] for part in messages[1]["content"]] == ["image", "text"]
    assert params == {"temperature": 0.3, "max_tokens": 2000}
    text = messages[1]["content"][1]["text"]
    assert (
        text == 'Verify ```json[\n  {"fact": "A dog."},\n  {"fact": "It is calm."},\n]\n``` by A brown dog.'
    )
    assert messages[0] == {"role": "system", "content": "You are a helpful assistant."}


def test_dcscore_starts_again_from_the_extraction_and_gives_up_after_five(dcscore: DCScore) -> None:
    judge = ScriptedJudge(
        {
            "dcscore_extract": lambda text: fenced(FACTS),
            "dcscore_match": lambda text: "I cannot.",
            "dcscore_verify": str,
        }
    )
    assert judged(dcscore, judge, "A calm dog.") == {"failed": 1}
    assert {name: len(calls) for name, calls in judge.asked.items()} == {
        "dcscore_extract": 5,
        "dcscore_match": 15,
    }


def test_captionqa_takes_the_letter_and_a_failed_call_is_missing(
    code: str, tmp_path: Path, png: Path
) -> None:
    questions = [
        {"question": "What colour?", "choices": ["red", "blue"], "answer": "red", "category": "c"},
        {"question": "What size?", "choices": ["large", "small"], "answer": "small", "category": "c"},
        {"question": "Which shape?", "choices": ["star", "ring"], "answer": "star", "category": "c"},
    ]
    data = data_file(tmp_path / "qa.json", [{"id": "nat_001", "images": [png.name], "questions": questions}])
    benchmark = CaptionQA(data=data, image_root=str(png.parent), official=True, code=code)

    def answer(text: str) -> str | None:
        if "What size?" in text:
            return None
        wanted = "red" if "What colour?" in text else "Cannot answer"
        (line,) = [line for line in text.partition("Options:")[2].splitlines() if wanted in line]
        return f" {line[0]}\n"

    judge = ScriptedJudge({"captionqa_answer": answer})
    record = judged(benchmark, judge, "A red thing.")
    assert record == {"domain": "natural", "points": [1.0, None, 0.55], "failed": 1}
    (messages, params), *_ = judge.asked["captionqa_answer"]
    assert messages[0]["content"] == "One letter."
    assert params == {"temperature": 0.0, "max_tokens": 4}
    assert messages[1]["content"][0]["text"].startswith(
        "Caption:\nA red thing.\n\nQuestion:\nWhat colour?\n\nOptions:\nA. "
    )


@pytest.mark.parametrize(
    ("texts", "points", "calls"),
    [
        (["Reason: it is true. Judgment: Caption 1 is better"], {1.0, -1.0}, 1),
        (["Judgment: Tie", "Reason: alike.\nJudgment: Tie."], {0.0}, 2),
        (["Reason: x.\nJudgment: **Caption 1**"], {0.0}, 1),  # stored, and no point for anybody
        (["no"] * 9, {0.0}, 5),
    ],
)
def test_caparena_asks_until_there_is_a_label(
    code: str, tmp_path: Path, png: Path, texts: list[str], points: set[float], calls: int
) -> None:
    captions = {"human": "A red square.", "GPT-4o-0806": "A square."}
    data = data_file(tmp_path / "arena.json", {png.name: {"captions": captions, "ref_model": "GPT-4o-0806"}})
    benchmark = CapArena(data=data, image_root=str(png.parent), official=True, code=code)
    left = list(texts)
    judge = ScriptedJudge({"caparena_compare": lambda text: left.pop(0)})
    record = judged(benchmark, judge, "A  red square.")
    assert record["points"] in points
    assert record["words"] == 4  # between single spaces
    assert len(judge.asked["caparena_compare"]) == calls
    messages, params = judge.asked["caparena_compare"][0]
    assert params == {"temperature": 0.1, "top_p": 0.9, "max_tokens": 1500}
    assert messages[0]["content"] == "You prefer. {not a field}"
    assert "Ref: A red square. {}" in messages[1]["content"][1]["text"]


def test_both_orders_cancel_what_the_order_decides(tmp_path: Path, png: Path) -> None:
    captions = {"human": "A red square.", "GPT-4o-0806": "A square."}
    data = data_file(tmp_path / "arena.json", {png.name: {"captions": captions, "ref_model": "GPT-4o-0806"}})
    always_first = json.dumps({"preferences": [{"id": 1, "reason": "r", "better": "first"}]})
    for both_orders, points, calls in ((True, {0.0}, 2), (False, {1.0, -1.0}, 1)):
        benchmark = CapArena(data=data, image_root=str(png.parent), both_orders=both_orders)
        judge = ScriptedJudge({"compare": lambda text: always_first})
        record = judged(benchmark, judge, "A red square!")
        assert record["points"] in points
        assert len(judge.asked["compare"]) == calls
