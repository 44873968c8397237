"""Captions that nobody has written, and the size of what a judge would say of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcap.estimate.language import Language, Said, growth_of, stand_in

SENTENCE = "A small brown dog runs along the wide empty beach in the evening sun"  # 14 words


def test_assertions_are_as_many_and_as_long_as_the_language_says() -> None:
    said = Language(words_per_assertion=3.5, words_in_assertion=5).assertions(SENTENCE)
    assert len(said) == 4  # 14 / 3.5
    assert all(len(text.split()) == 5 and text.endswith(".") for text in said)


def test_what_is_repeated_asserts_nothing_again() -> None:
    language = Language()
    assert language.assertions(f"{SENTENCE}. {SENTENCE}.") == language.assertions(SENTENCE)
    assert language.assertions("  ") == []
    assert len(language.assertions("Dog.")) == 1


def test_captions_of_an_image_repeat_each_other_as_much_as_assumed() -> None:
    language = Language(words_per_assertion=2, words_in_assertion=4, growth=0.5)
    said = Said(language)
    captions = [stand_in(SENTENCE * 3, 40, number) for number in range(16)]
    made = [said.assertions(caption) for caption in captions]
    assert {len(assertions) for assertions in made} == {20}  # 40 words / 2
    # 16 captions hold 16 ** 0.5 = 4 times the assertions of one; 4 hold 2 times as many
    assert len(set().union(*made)) == pytest.approx(4 * 20, abs=2)
    assert len(set().union(*made[:4])) == pytest.approx(2 * 20, abs=2)


@given(st.lists(st.lists(st.sampled_from("red blue dog cat runs".split()), max_size=30), max_size=8))  # noqa: SIM905
def test_no_caption_asserts_more_than_it_says(captions: list[list[str]]) -> None:
    language = Language()
    said = Said(language)
    for words in captions:
        text = " ".join(words)
        made = said.assertions(text)
        assert len(made) == len(set(made)) == len(language.assertions(text))


def test_stand_ins_differ_and_keep_the_length() -> None:
    drawn = [stand_in(SENTENCE, 14, number) for number in range(50)]
    assert len(set(drawn)) == 50
    assert {tuple(sorted(text.split())) for text in drawn} == {tuple(sorted(SENTENCE.split()))}
    assert len(stand_in(SENTENCE, 30, 0).split()) == 30
    assert stand_in("", 30, 0) == ""
    assert stand_in(SENTENCE, 14, 3) == stand_in(SENTENCE, 14, 3)


def test_growth_is_0_for_equal_captions_and_1_for_captions_that_share_nothing() -> None:
    assert growth_of([[SENTENCE, SENTENCE, SENTENCE]]) == pytest.approx(0)
    assert growth_of([[SENTENCE, "Two green parrots sit upon a rusty old gate"]]) == pytest.approx(1)
    # Pairs: (red dog, dog sleeps), (red dog, dog barks): 4, of which 3 differ: 1 + log(3/4) / log(2) = 0.585
    assert growth_of([["A red dog sleeps", "The red dog barks"]]) == pytest.approx(0.585, abs=1e-3)
    assert growth_of([]) is None
    assert growth_of([["alone"]]) is None
    assert growth_of([["", ""]]) is None
