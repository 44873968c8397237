"""What is said of captions without a judge."""

from __future__ import annotations

import math

import pytest

from balcap.benchmarks.text import distinct_n, meta_commentary, repeated_ngrams, text_statistics


def test_distinct_n_is_over_all_captions() -> None:
    # a red dog / red dog runs: bigrams a-red red-dog red-dog dog-runs: 3 of 4
    assert distinct_n(["A red dog.", "Red dog runs"]) == pytest.approx(3 / 4)
    assert math.isnan(distinct_n(["dog"]))


def test_repeated_ngrams_are_those_of_the_same_caption() -> None:
    text = "there is a dog and there is a dog"
    # 4-grams: there-is-a-dog, is-a-dog-and, a-dog-and-there, dog-and-there-is, and-there-is-a, there-is-a-dog: 1 of 6
    assert repeated_ngrams(text) == pytest.approx(1 / 6)
    assert repeated_ngrams("A dog.") == 0


def test_meta_commentary_is_a_share_of_sentences() -> None:
    text = (
        "A dog lies on a sofa. The scene evokes a calm mood. A cup stands beside it. Overall, it is inviting!"
    )
    assert meta_commentary(text) == pytest.approx(0.5)
    assert meta_commentary("") == 0
    assert meta_commentary("A sign reads OVERALLS.") == 0


def test_all_together() -> None:
    statistics = text_statistics(["A red dog.", "The mood is calm."])
    assert statistics == {"distinct_2": 1.0, "repeated_4grams": 0.0, "meta_commentary": 0.5}
    assert text_statistics([]) == {}
