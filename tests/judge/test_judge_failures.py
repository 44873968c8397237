"""A judge that misbehaves: repeated where that can help, missing where it cannot, never a crash or a 0."""

from __future__ import annotations

import pytest
import torch
from judge_fakes import JudgeServer

from balcap.judge import Judge, JudgeFailure, Rating, Verdict, client, retry
from balcap.rewards import Linguistic, Precision, Recall, RewardSuite
from balcap.types import CaptionBatch, Rollouts
from tests.judge_questions import match, rate, verify
from tests.judge_replies import said


def rollouts(captions: list[list[str]], image: bytes, reference: str = "A cat. A mat") -> Rollouts:
    B, G = len(captions), len(captions[0])
    batch = CaptionBatch(
        sample_ids=[f"image {i}" for i in range(B)],
        images=[],
        image_bytes=[(image,)] * B,
        prompts=["Describe."] * B,
        references=[reference] * B,
    )
    tokens = torch.zeros(B, G, 1)
    return Rollouts(
        batch=batch,
        captions=captions,
        token_ids=tokens.long(),
        completion_mask=tokens.bool(),
        sampler_logps=tokens,
        truncated=tokens[..., 0].bool(),
        lengths=tokens[..., 0].long(),
        reference_lengths=torch.ones(B).long(),
    )


@pytest.mark.parametrize("fault", ["429", "503", "truncated", "empty", "out_of_range"])
def test_repeated_until_it_works(make_judge, server, fault):
    server.script = [fault, fault]
    judge = make_judge(retries=2)
    assert judge.run(rate(judge, "A cat.")) == Rating(1.0, 0.5, 0.0)
    assert server.calls == 3
    assert judge.stats().failures == {}


@pytest.mark.parametrize("fault", ["500", "truncated"])
def test_missing_after_the_last_retry(make_judge, server, fault):
    server.always = fault
    judge = make_judge(retries=1)
    with pytest.raises(JudgeFailure, match="after 2 calls"):
        judge.run(rate(judge, "A cat."))
    assert server.calls == 2
    assert judge.stats().failures == {"rate": 1}


@pytest.mark.parametrize("fault", ["401", "400", "404", "quota", "refusal", "filter", "length"])
def test_not_repeated_where_it_cannot_help(make_judge, server, fault):
    server.always = fault
    judge = make_judge(retries=3)
    with pytest.raises(JudgeFailure):
        judge.run(rate(judge, "A cat."))
    assert server.calls == 1
    assert judge.stats().failures == {"rate": 1}


@pytest.mark.parametrize("fault", ["short", "unknown_id", "twice"])
def test_lists_that_do_not_fit_the_question(make_judge, server, png, fault):
    server.script = [fault]
    judge = make_judge(retries=1)
    assert judge.run(verify(judge, png, ["A cat", "not a dog"])) == [
        Verdict(True, True),
        Verdict(False, True),
    ]
    assert server.calls == 2
    server.always = fault
    with pytest.raises(JudgeFailure, match="invalid answer"):
        judge.run(match(judge, ["A cat", "A mat"], ["A cat"]))


def test_prose_around_the_answer_is_fine(make_judge, server):
    server.always = "prose"
    judge = make_judge(retries=0)
    assert judge.run(rate(judge, "A cat.")) == Rating(1.0, 0.5, 0.0)


def test_a_call_that_hangs_is_given_up(make_judge, server):
    server.script = ["hang"]
    judge = make_judge(timeout_s=2.0, retries=1)
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0
    assert server.calls == 2


def test_nobody_listens(make_judge):
    judge = make_judge(params={"api_base": "http://127.0.0.1:9/v1"}, retries=1)
    with pytest.raises(JudgeFailure, match="after 2 calls"):
        judge.run(rate(judge, "A cat."))


def test_unknown_provider_is_a_failure_not_a_crash(make_judge):
    judge = make_judge(model="nonsense/foo", params=None, retries=0)
    with pytest.raises(JudgeFailure, match="nonsense"):
        judge.run(rate(judge, "A cat."))


def test_retry_after_is_respected():
    limited = RuntimeError("slow down")
    limited.litellm_response_headers = {"retry-after": "7"}  # as litellm attaches them
    assert client._retry_after(limited) == 7.0
    assert retry._backoff(0, 7.0) == 7.0
    assert retry._backoff(0, 3600.0) == retry.LONGEST_BACKOFF_S
    assert retry.BACKOFF_S / 2 <= retry._backoff(0, 0.0) <= retry.BACKOFF_S


class Failing(JudgeServer):
    """Fails for good on the tasks in `broken`, optionally only where `word` occurs."""

    broken: tuple[str, ...] = ()
    word = ""

    async def _answer(self, request):
        body = await request.json()
        task = body["messages"][0]["content"].splitlines()[0].removeprefix("Task: ")
        text = said(body["messages"][1])
        self.always = "400" if task in self.broken and self.word in text else None
        return await super()._answer(request)


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Failing()
    yield server
    server.close()


def judged(server: Failing, png: bytes, **settings):
    suite = RewardSuite([Precision(), Recall(), Linguistic()])
    defaults = {"params": {"api_base": server.url}, "cache": None, "retries": 0, "max_failed_share": 1.0}
    # a caption per call, so that a failure hits one caption
    defaults["per_call"] = {"decompose": 1, "match": 1}
    judge = Judge("openai/gpt-4o-mini", **{**defaults, **settings})
    judgments = suite.gather(judge, rollouts([["A cat. calm", "A mat", "A cat. calm"]], png))
    stats = judge.stats()
    judge.close()
    return judgments, suite(None, judgments), stats


NAN = float("nan")


def assert_rewards(rewards: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(rewards, torch.tensor(expected), equal_nan=True)


def test_equal_captions_are_asked_once(failing, png):
    judgments, rewards, stats = judged(failing, png)
    # "A cat. calm": 1 of 2 pointable, covers 1 of 2 units; "A mat": 1 of 1, covers 1 of 2. Language 0.5.
    assert_rewards(rewards, [[[0.5, 0.5, 0.5], [1.0, 0.5, 0.5], [0.5, 0.5, 0.5]]])
    # 2 distinct captions + 1 reference decomposed; 2 matched and rated; 3 assertions verified in one call
    assert stats.calls == 3 + 2 * 2 + 1
    assert judgments.units == [["A cat", "A mat"]]
    assert judgments.failures == {}


def test_a_failed_rating_is_missing_alone(failing, png):
    failing.broken, failing.word = ("rate",), "calm"
    judgments, rewards, stats = judged(failing, png)
    assert_rewards(rewards, [[[0.5, 0.5, NAN], [1.0, 0.5, 0.5], [0.5, 0.5, NAN]]])
    assert judgments.failures == {"rate": 2}  # two rollouts miss it
    assert stats.failures == {"rate": 1}  # one request failed
    assert len(judgments.reasons) == 1


def test_a_failed_decomposition_takes_what_builds_on_it_along(failing, png):
    failing.broken, failing.word = ("decompose",), "calm"
    judgments, rewards, stats = judged(failing, png)
    assert_rewards(rewards, [[[NAN, NAN, 0.5], [1.0, 0.5, 0.5], [NAN, NAN, 0.5]]])
    assert judgments.failures == {"decompose": 2, "verify": 2, "match": 2}
    assert stats.failures == {"decompose": 1}


def test_a_failed_reference_is_missing_recall_for_its_group(failing, png):
    failing.broken, failing.word = ("decompose",), "A cat. A mat"
    judgments, rewards, _ = judged(failing, png)
    assert_rewards(rewards, [[[0.5, NAN, 0.5], [1.0, NAN, 0.5], [0.5, NAN, 0.5]]])
    assert judgments.units == [None]
    assert judgments.failures == {"match": 3}


def test_nothing_raises_when_everything_fails(failing, png):
    failing.broken = ("decompose", "rate")
    judgments, rewards, _ = judged(failing, png)
    assert rewards.isnan().all()
    assert rewards.shape == (1, 3, 3)
    assert judgments.failures == {"decompose": 3, "verify": 3, "match": 3, "rate": 3}


def test_an_unreadable_image_is_missing_precision(failing):
    _, rewards, _ = judged(failing, b"not an image")
    assert_rewards(rewards, [[[NAN, 0.5, 0.5], [NAN, 0.5, 0.5], [NAN, 0.5, 0.5]]])
