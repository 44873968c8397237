"""Which characters of a caption each sampled token stands for."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap.policy.offsets import HALF, token_offsets, tokens_of
from tests.support import ROOT

many = settings(max_examples=150, deadline=None)
texts = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("a e\u0301漢字😀👩\u200d🚀 .\n")), max_size=25
)


def _embedded() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "assets/shapes-base")


def _sentence_pieces() -> Any:
    """Like Llama's: a mark for a space, which the first word loses, and bytes for what is not in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], vocab_size=60, show_progress=False)
    trained.train_from_iterator(["a red circle above a blue square"] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = {
        token: number for number, token in enumerate([*model["vocab"], *(f"<0x{b:02X}>" for b in range(256))])
    }
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {"byte_level": _embedded(), "sentence_pieces": _sentence_pieces()}


def check(tokenizer: Any, ids: list[int], data: st.DataObject) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    text = whole.strip()
    offsets = token_offsets(tokenizer, ids, text)
    assert len(offsets) == len(ids)
    known = [one for one in offsets if one is not None]
    if text and not known:  # one byte more, and a byte fallback decodes those before it to something else
        assert HALF in text
        assert tokenizer is TOKENIZERS["sentence_pieces"]
        return
    assert known == sorted(known)
    assert all(a == b or a[1] == b[0] for a, b in pairwise(known))
    assert [known[0][0], known[-1][1]] == [0, len(text)] if text else known == []
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    tokens = tokens_of((start, end), offsets)
    assert text[start:end].strip() in tokenizer.decode([ids[place] for place in tokens])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts, data=st.data())
@many
def test_offsets_of_encoded_texts(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    check(tokenizer, [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], data)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@many
def test_offsets_of_tokens_that_no_text_is_encoded_to(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    check(tokenizer, data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20)), data)


def test_golden() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [*tokenizer(" A red 😀.")["input_ids"], tokenizer.eos_token_id]
    offsets = token_offsets(tokenizer, ids, "A red 😀.")
    smile = (6, 7)  # four bytes, four tokens
    assert offsets == [(0, 1), (1, 5), (5, 6), *[smile] * 4, (7, 8), None]
    assert tokens_of((2, 5), offsets) == [1]
    assert tokens_of((6, 7), offsets) == [3, 4, 5, 6]
    cut = token_offsets(tokenizer, ids[:5], "A red \ufffd")  # at the limit, within a character
    assert cut == [(0, 1), (1, 5), (5, 6), smile, smile]


def test_golden_of_sentence_pieces() -> None:
    tokenizer = TOKENIZERS["sentence_pieces"]
    ids = tokenizer("a red 😀 circle", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([number]) for number in ids][:2] == ["a", "red"]
    smile = (6, 7)
    assert token_offsets(tokenizer, ids, "a red 😀 circle") == [(0, 1), (1, 5), (5, 6), *[smile] * 4, (7, 14)]


def test_another_text_has_no_offsets() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer("A red circle.")["input_ids"]
    assert token_offsets(tokenizer, ids, "A blue circle.") == [None] * len(ids)
    assert token_offsets(tokenizer, [], "") == []
