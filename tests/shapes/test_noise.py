"""A judge that errs, and one that confirms what nobody can refute."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from balcap.judge import Judge
from balcap.judge.tasks import Compare, Match, Rate, Verify
from examples.shapes.noise import Noise
from examples.shapes.oracle import CONFIRMED, answer
from examples.shapes.scene import draw_scene, png_bytes, sample_scene

TRUE, FALSE = "There is a circle.", "There is a zebra-striped pyramid."


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    scenes = [sample_scene(np.random.default_rng(i)) for i in range(40)]
    return [png_bytes(draw_scene(one, np.random.default_rng(i)), one) for i, one in enumerate(scenes)]


def asked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As they are sent."""

    def part(one: dict[str, Any]) -> dict[str, Any]:
        if one["type"] != "image":
            return one
        url = "data:image/png;base64," + base64.b64encode(one["image"]).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    system, user = messages
    return [system, user | {"content": [part(one) for one in user["content"]]}]


def verdicts(image: bytes, assertions: list[str], noise: Noise) -> list[tuple[bool, bool]]:
    found = answer(asked(Verify().messages(assertions, image=image)), noise)
    return [(one["true"], one["pointable"]) for one in found["verdicts"]]


def test_commentary_is_mostly_confirmed_and_never_pointable(images: list[bytes]) -> None:
    remarks = [f"The colours create a {word} atmosphere." for word in ("calm", "playful", "serene", "lovely")]
    said = [one for image in images for one in verdicts(image, remarks, Noise())]
    assert not any(pointable for _, pointable in said)
    assert np.mean([true for true, _ in said]) == pytest.approx(CONFIRMED, abs=0.08)
    assert verdicts(images[0], remarks, Noise()) == verdicts(images[0], remarks, Noise())


def test_a_share_of_the_verdicts_is_wrong(images: list[bytes]) -> None:
    units = [
        f"There is a {colour} {shape}."
        for colour in ("red", "blue", "green", "pink")
        for shape in ("circle", "star")
    ]

    def rates(noise: Noise) -> tuple[float, float]:
        """Shares of true and of false assertions that are said to be otherwise."""
        right = [one for image in images for one, _ in verdicts(image, units, Noise())]
        said = [one for image in images for one, _ in verdicts(image, units, noise)]
        wrong = np.array(right) != np.array(said)
        return float(wrong[np.array(right)].mean()), float(wrong[~np.array(right)].mean())

    assert rates(Noise()) == (0, 0)
    assert rates(Noise(flip=0.2)) == pytest.approx((0.2, 0.2), abs=0.1)
    assert rates(Noise(lenient=0.3)) == pytest.approx((0, 0.3), abs=0.06)
    assert rates(Noise(flip=1)) == (1, 1)
    true, false = rates(Noise(position=0.5))
    assert true == 0
    assert false == pytest.approx(0.25, abs=0.06)  # the mean of 0 to 0.5


def test_units_may_be_taken_for_covered() -> None:
    messages = Match().messages(
        [("There is a red circle.",)], units=("There is a red circle.", "There is a blue star.")
    )
    assert answer(messages)["captions"] == [{"id": 1, "covered": [1], "missing": [2]}]
    assert answer(messages, Noise(lenient=1))["captions"] == [{"id": 1, "covered": [1, 2], "missing": []}]


def test_long_captions_may_please(images: list[bytes]) -> None:
    texts = ["A circle.", "A circle. " * 50]
    short, long = answer(Rate().messages(texts), Noise(length=0.5))["captions"]
    plain_short, plain_long = answer(Rate().messages(texts))["captions"]
    for aspect in ("clarity", "fluency", "coherency"):
        assert long[aspect] == pytest.approx(plain_long[aspect] + 0.5 * (10 - plain_long[aspect]), abs=0.06)
        assert short[aspect] - plain_short[aspect] < 0.2


def test_the_first_of_two_may_win_whatever_it_says(images: list[bytes]) -> None:
    pair = ("There is a zebra.", "This image shows shapes. There is a circle.")
    messages = asked(Compare().messages([pair], image=images[0], reference=""))
    assert answer(messages) != answer(messages, Noise(position=1))


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_noise_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"noise\.lenient"):
        Noise(lenient=value)


def test_a_config_sets_it(images: list[bytes]) -> None:
    judge = Judge(
        "shapes/oracle",
        providers={"shapes": "examples.shapes.oracle.Oracle"},
        params={"noise": {"lenient": 1.0}},
        cache=None,
    )
    (verdict,) = judge.submit(judge.ask(Verify, [FALSE], image=(images[0],))).result()
    judge.close()
    assert verdict.true
