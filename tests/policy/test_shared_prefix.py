"""One vision pass and one prompt per image: the same log-probs and gradients as one sequence per caption."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from balcap.policy import PolicyConfig, attention, varlen
from balcap.policy.config import LoraSettings
from balcap.policy.families import base_of
from balcap.policy.head import token_logps
from balcap.policy.layout import Layout
from balcap.policy.policy import Policy
from tests import varlen_reference
from tests.tiny_models import batch_of, mixed_batch, picture, rollouts_of

Load = Callable[..., Policy]
WORDS = range(20, 300)
pairs = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=3)
groups = pairs.filter(lambda lengths: any(map(any, lengths)))
MANY = settings(
    max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


# ---- the layout


def test_the_layout_by_hand():
    # Image 0: prompt at 0-2, a caption of 3 tokens of which 2 are forwarded (3, 4), one of 1 (none).
    # Image 1: prompt at 5-6, an empty caption, one of 2 (7).
    layout = Layout([3, 2], [[3, 1], [0, 2]])
    assert layout.tokens == 8
    assert layout.predictors.tolist() == [2, 3, 4, 2, 6, 7]
    index = layout.attention
    # 8, the number of tokens, is padding
    assert index.prompts.tolist() == [[0, 1, 2], [5, 6, 8]]
    assert index.captions.tolist() == [[3, 4], [7, 8]]
    assert index.own.tolist() == [[[3, 4], [8, 8]], [[8, 8], [7, 8]]]
    assert index.places.tolist() == [[0, 1], [6, 0]]
    assert index.order.tolist() == [0, 1, 2, 6, 7, 3, 4, 8]
    packed = layout.varlen
    assert packed.bounds.tolist() == [0, 3, 5, 7, 8]
    assert packed.key_bounds.tolist() == [0, 3, 8, 10, 13]
    assert packed.longest == 5
    assert packed.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 5, 6, 7]
    # 13, the number of keys, is none
    assert packed.copies.tolist() == [[0, 3], [1, 4], [2, 5], [6, 13], [7, 13], [8, 10], [9, 11], [12, 13]]
    assert index.prompt_mask is not None
    assert index.prompt_mask.tolist() == [[True] * 3, [True, True, False]]
    # (3 + 3) + (3 + 1) + (2 + 0) + (2 + 2)
    assert layout.separate == 16
    # four captions, each with the longest prompt, 3, and the longest caption, 3
    assert layout.separate_padded == 4 * (3 + 3)
    # forwarded caption tokens 2 + 0 + 0 + 1 of the cells 2 * 2 + 2 * 1
    assert layout.padding == pytest.approx(1 - 3 / 6)
    nothing = Layout([2], [[0, 0]])
    assert (nothing.separate_padded, nothing.padding) == (2 * (2 + 1), 0)
    assert nothing.attention.captions.shape == (1, 0)
    assert nothing.attention.prompt_mask is None  # one prompt, no padding


@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 7), min_size=1, max_size=4)), min_size=1)
)
def test_every_token_stands_once(images):
    prompts, captions = zip(*images, strict=True)
    layout = Layout(prompts, captions)
    assert layout.spans[-1].end == layout.tokens
    index = layout.attention
    for side_by_side in (index.captions, index.own):
        tokens = torch.cat([index.prompts.flatten(), side_by_side.flatten()])
        assert sorted(tokens[tokens < layout.tokens].tolist()) == list(range(layout.tokens))
    there = index.captions < layout.tokens
    assert (index.own.flatten()[index.places[there]] == index.captions[there]).all()
    both = torch.cat([index.prompts.flatten(), index.captions.flatten()])
    assert both[index.order].tolist() == list(range(layout.tokens))
    assert len(layout.predictors) == sum(map(sum, captions))


def attend(name: str, layout: Layout, *qkv_and_scale):
    """By one of the ways, a GPU's too: its kernel is the reference's here."""
    with mock.patch.object(varlen, "varlen_attn", varlen_reference.varlen_attn):
        return getattr(attention, name)(*qkv_and_scale, layout.attention._replace(varlen=layout.varlen))


@pytest.mark.parametrize("name", ["_merged", "_expanded", "_varlen"])
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 5), st.sampled_from([1, 2]))
@settings(max_examples=30)
def test_attention_sees_the_prompt_and_itself(name, captions, prompt, kv_heads):
    """Against plain causal attention over [prompt, caption], one caption at a time; gradients too."""
    layout = Layout([prompt, 3], [captions, [2]])
    generator = torch.Generator().manual_seed(prompt)
    query = torch.randn(layout.tokens, 4, 8, generator=generator, requires_grad=True)
    key, value = (
        torch.randn(layout.tokens, kv_heads, 8, generator=generator, requires_grad=True) for _ in "kv"
    )
    weights = torch.randn(layout.tokens, 4, 8, generator=generator)
    out = attend(name, layout, query, key, value, 8**-0.5)  # [N, Hq, D]
    ours = torch.autograd.grad((out * weights).sum(), (query, key, value))
    alone, once = torch.zeros_like(out), torch.zeros(layout.tokens, 1, 1)
    for span in layout.spans:
        whole = torch.arange(span.start, span.start + span.prompt)
        tokens = torch.arange(span.start + span.prompt, span.end)
        for own in tokens.split(span.captions) or (tokens,):
            where = torch.cat([whole, own])
            q, k, v = (x[where].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(4 // kv_heads, 0) for x in (k, v))
            attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
            alone, once = (
                alone.index_add(0, where, attended),
                once.index_add(0, where, torch.ones(len(where), 1, 1)),
            )
    alone = alone / once
    theirs = torch.autograd.grad((alone * weights).sum(), (query, key, value))
    for mine, other in zip((out, *ours), (alone, *theirs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["_merged", "_expanded", "_varlen"])
def test_scores_beyond_what_exp_can_hold(name):
    """Padding must not turn them into NaN."""
    layout = Layout([4, 2], [[3, 1], [5, 0]])
    rows = [torch.full((layout.tokens, 1, 4), 30.0, requires_grad=True) for _ in range(3)]
    out = attend(name, layout, *rows, 1.0)
    out.sum().backward()
    assert all(bool(x.isfinite().all()) for x in (out, *(row.grad for row in rows)))


# ---- the head


@pytest.mark.parametrize("cells", [1, 37 * 3, 10**9])
def test_chunks_of_logits_change_nothing(cells):
    head = torch.nn.Linear(5, 37)
    states = torch.randn(10, 5, requires_grad=True)
    targets = torch.randint(37, (10,))
    logps, entropy = token_logps(head, states, targets, 0.7, entropy=True, cells=cells)
    logps.sum().backward()
    given_states, given_weight = states.grad, head.weight.grad
    head.weight.grad = None
    plain = states.detach().requires_grad_()
    expected = (head(plain) / 0.7).log_softmax(-1)
    expected.gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(logps, expected.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=expected).entropy())
    torch.testing.assert_close(given_states, plain.grad)
    torch.testing.assert_close(given_weight, head.weight.grad)


def test_no_more_logits_than_cells_are_held():
    sizes = []

    class Head(torch.nn.Linear):
        def forward(self, states):
            sizes.append(len(states))
            return super().forward(states)

    token_logps(Head(5, 37), torch.randn(10, 5), torch.randint(37, (10,)), cells=37 * 3)
    assert sizes == [3, 3, 3, 1]


# ---- against separate sequences


def both(load: Load, **config) -> tuple[Policy, Policy]:
    shared, separate = load(**config), load(shared_prefix=False, **config)
    separate.model.load_state_dict(shared.model.state_dict())
    assert (shared.shared_prefix, separate.shared_prefix) == (True, False)
    return shared, separate


def gradients(policy: Policy, rollouts, rows, weights) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.model.zero_grad()
    logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), rows, 0.9)
    (logps * weights[rows]).sum().backward()
    return logps.detach(), {
        n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None
    }


LORA = LoraSettings(r=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def loud_adapter(policy: Policy) -> None:
    """An adapter that matters: peft starts with its second half at zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.15, generator=generator)


@pytest.mark.parametrize("kind", ["full", "lora", "vision", "checkpointing"])
@MANY
@given(lengths=groups, seed=st.integers(0, 3), sizes=st.permutations([(64, 64), (150, 60), (70, 200)]))
def test_log_probs_and_gradients_are_those_of_separate_sequences(load: Load, kind: str, lengths, seed, sizes):
    config = {
        "full": {},
        "lora": {"lora": LORA},
        "vision": {"freeze_vision": False},
        "checkpointing": {"gradient_checkpointing": True},
    }[kind]
    shared, separate = both(load, **config)
    for policy in (shared, separate):
        loud_adapter(policy)
        policy.model.train()
    prompts = ["What is this?", "Describe the image in detail, please.", "Go"][: len(lengths)]
    images = [picture(w, h, seed=i) for i, (w, h) in enumerate(sizes[: len(lengths)])]
    rollouts = rollouts_of(batch_of(images, prompts), lengths, WORDS, seed=seed)
    weights = torch.randn(rollouts.token_ids.shape, generator=torch.Generator().manual_seed(seed))
    rows = list(range(len(lengths)))
    ours, mine = gradients(shared, rollouts, rows, weights)
    naive, theirs = gradients(separate, rollouts, rows, weights)
    torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-6)  # float32 holds 7 digits of what may be -20
    for name, gradient in theirs.items():
        error = (mine.get(name, torch.zeros(())) - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-5, name
    assert set(mine) <= set(theirs)


def test_the_reference_is_the_policy_without_its_adapter(load: Load):
    shared, separate = both(load, lora=LORA)
    rollouts = rollouts_of(mixed_batch(), [[3, 5], [2, 4], [6, 1]], WORDS)
    for policy in (shared, separate):
        loud_adapter(policy)
    prompts, plain = shared.encode(rollouts.batch), separate.encode(rollouts.batch)
    ours = shared.reference_logps(rollouts, prompts, [0, 1, 2])
    torch.testing.assert_close(ours, separate.reference_logps(rollouts, plain, [0, 1, 2]), atol=1e-5, rtol=0)
    assert (ours - shared.logps(rollouts, prompts, [0, 1, 2])[0]).abs().max() > 1e-2


def test_a_frozen_tower_sees_each_image_once_per_step(load: Load):
    policy = load(with_reference=True)
    rollouts = rollouts_of(mixed_batch(), [[3, 5], [2, 4], [6, 1]], WORDS)
    prompts = policy.encode(rollouts.batch)
    seen = []
    inner = base_of(policy.model).model
    before = inner.get_image_features
    inner.get_image_features = lambda pixel_values, *args, **kwargs: (
        seen.append(1) or before(pixel_values, *args, **kwargs)
    )
    policy.logps(rollouts, prompts, [0, 1])
    policy.logps(rollouts, prompts, [1, 2])
    policy.reference_logps(rollouts, prompts, [0, 1, 2])
    policy.logps(rollouts, prompts, [0, 1, 2])
    assert len(seen) == 2  # images 0 and 1, then image 2
    assert not any(feature.embeds.requires_grad for feature in prompts.features.values())


def test_sampling_is_not_disturbed(load: Load):
    """`generate` runs through the attention that was there before."""
    shared, separate = both(load)
    batch = mixed_batch()
    inputs = shared.encode(batch).inputs([0, 1, 2], 1, "cpu")
    given = [p.model.generate(**inputs, max_new_tokens=8, do_sample=False) for p in (shared, separate)]
    assert torch.equal(*given)


@pytest.mark.parametrize("why", ["switched off", "another attention"])
def test_models_that_cannot_take_it_say_so(folders: dict[str, Path], caplog, why: str):
    config = {"shared_prefix": False} if why == "switched off" else {"attn_implementation": "eager"}
    with caplog.at_level(logging.WARNING):
        policy = Policy.load(PolicyConfig(model=str(folders["qwen"]), dtype="float32", **config), False)
    assert not policy.shared_prefix
    said = [record.message for record in caplog.records if "model.policy.shared_prefix" in record.message]
    assert len(said) == (why == "another attention")
    rollouts = rollouts_of(mixed_batch(), [[3, 5], [2, 4], [6, 1]], WORDS)
    assert policy.logps(rollouts, policy.encode(rollouts.batch), [0, 1, 2])[0].isfinite().all()
