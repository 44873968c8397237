"""Captions sampled on the policy itself: whose distribution it is, where they end, what they carry. With each prompt read
once and with HF ``generate``, alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from balcap.policy import LoraSettings
from balcap.policy.families import base_of
from balcap.policy.policy import Policy
from balcap.rollout import Sampling, decode, hf
from balcap.rollout.base import pack, until_stop
from balcap.rollout.hf import HFGenerate, _Recorder
from balcap.types import CaptionBatch, Rollouts
from tests.tiny_models import batch_of, mixed_batch, own_logits, picture

Load = Callable[..., Policy]


@pytest.fixture(autouse=True, params=["decode", "generate"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How captions are sampled."""
    if request.param == "generate":
        monkeypatch.setattr(hf, "can_decode", lambda model: False)
    return request.param


def sample(
    policy: Policy,
    num_captions: int = 3,
    batch: CaptionBatch | None = None,
    seed: int = 0,
    engine_size: int = 256,
    **how,
) -> Rollouts:
    engine = HFGenerate(engine_size)
    engine.attach(policy)
    batch = batch or mixed_batch()
    torch.manual_seed(seed)
    return engine.generate(batch, policy.encode(batch), num_captions, Sampling(**({"max_tokens": 8} | how)))


def bias(policy: Policy, tokens: list[int], by: float) -> None:
    """Make these tokens likelier than the weights say."""
    model = policy.model.get_base_model() if policy.has_adapter else policy.model

    def add(module: object, args: object, logits: Tensor) -> Tensor:
        return logits.index_add(-1, torch.tensor(tokens), torch.full((*logits.shape[:-1], len(tokens)), by))

    model.lm_head.register_forward_hook(add)


def eos(policy: Policy) -> int:
    return policy.encoder.tokenizer.eos_token_id


# ── the distribution ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_log_probs_are_the_policys(load: Load, temperature: float):
    policy = load()
    bias(policy, [eos(policy)], 3.0)
    rollouts = sample(policy, temperature=temperature, max_tokens=12)
    assert not rollouts.completion_mask.all(), "captions end at different places"
    logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), [0, 1, 2], temperature)
    torch.testing.assert_close(rollouts.sampler_logps, logps, atol=1e-4, rtol=0)
    other, _ = policy.logps(rollouts, policy.encode(rollouts.batch), [0, 1, 2], temperature + 0.5)
    assert (rollouts.sampler_logps - other).abs().max() > 0.1


def test_an_adapter_samples_and_scores_alike(load: Load):
    policy = load(lora=LoraSettings(target_modules=["q_proj", "v_proj"], r=4))
    for name, parameter in policy.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rollouts = sample(policy)
    prompts = policy.encode(rollouts.batch)
    torch.testing.assert_close(
        rollouts.sampler_logps, policy.logps(rollouts, prompts, [0, 1, 2])[0], atol=1e-4, rtol=0
    )
    reference = policy.reference_logps(rollouts, prompts, [0, 1, 2])
    assert (rollouts.sampler_logps - reference).abs().max() > 0.1


def test_first_tokens_come_in_the_proportions_of_the_policy(load: Load, family: str):
    policy, n = load(), 1500
    batch = batch_of([picture(60, 60)], ["What is this?"])
    drawn = sample(policy, n, batch, engine_size=n, temperature=0.8, max_tokens=1).token_ids.flatten()
    with torch.no_grad():
        logits = own_logits(
            family,
            policy.model,
            policy.encoder.processor,
            batch.images[0][0],
            batch.prompts[0],
            torch.tensor([0]),
        )[0]
    logits[policy.encoder.banned_token_ids] = -torch.inf
    frequencies = torch.bincount(drawn, minlength=len(logits)) / n
    p, wrong = (logits / 0.8).softmax(-1), logits.softmax(-1)
    # a frequency is off by sqrt(2 p (1 - p) / (pi n)) on average
    by_chance = (2 * p * (1 - p) / (torch.pi * n)).sqrt().sum()
    assert (frequencies - p).abs().sum() < 1.3 * by_chance
    assert (frequencies - wrong).abs().sum() > 1.6 * by_chance, "another temperature would be noticed"


@pytest.mark.parametrize("adapter", [False, True])
def test_settings_that_the_hub_ships_do_not_leak(load: Load, adapter: bool):
    policy = load(lora=LoraSettings(target_modules=["q_proj"], r=2) if adapter else None)
    bias(policy, [eos(policy)], 2.0)
    expected = sample(policy, 4)
    model = policy.model.get_base_model() if adapter else policy.model
    word = int(expected.token_ids[0, 0, 0])
    theirs = {
        "do_sample": False,
        "temperature": 0.1,
        "top_k": 1,
        "top_p": 0.1,
        "repetition_penalty": 1.05,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 8,
        "min_p": 0.5,
        "typical_p": 0.2,
        "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1,
        "bad_words_ids": [[word]],
        "suppress_tokens": [word],
        "begin_suppress_tokens": [word],
        "sequence_bias": [[[word], -9.0]],
        "guidance_scale": 2.0,
        "renormalize_logits": True,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "max_length": 3,
        "max_time": 1e-9,
        "stop_strings": ["e"],
    }
    for name, value in theirs.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    rollouts = sample(policy, 4)
    assert torch.equal(rollouts.token_ids, expected.token_ids)
    assert torch.equal(rollouts.sampler_logps, expected.sampler_logps)
    assert len(set(rollouts.captions[0])) == 4, "with top_k 1 all would be one"
    assert model.generation_config is own, "the model is exported with what it came with"


def test_banned_tokens_are_never_sampled(load: Load):
    policy = load()
    banned = policy.encoder.banned_token_ids
    bias(policy, banned, 30.0)
    for top_p in (1.0, 0.5):
        rollouts = sample(policy, 8, top_p=top_p)
        assert not torch.isin(rollouts.token_ids[rollouts.completion_mask], torch.tensor(banned)).any()
        assert rollouts.sampler_logps.isfinite().all()
        prompts = policy.encode(rollouts.batch)  # log-probs are those before the ban, as in training
        torch.testing.assert_close(
            rollouts.sampler_logps, policy.logps(rollouts, prompts, [0, 1, 2])[0], atol=1e-4, rtol=0
        )
    policy.encoder.banned_token_ids = []
    unbanned = sample(policy, 8, max_tokens=1).token_ids
    assert torch.isin(unbanned, torch.tensor(banned)).all(), "without the ban nothing else is drawn"


def test_a_tiny_top_p_takes_the_likeliest_token(load: Load, family: str):
    policy = load()
    rollouts = sample(policy, 2, top_p=1e-6, max_tokens=6)
    batch = rollouts.batch
    assert torch.equal(rollouts.token_ids[:, 0], rollouts.token_ids[:, 1])
    for b in range(3):
        ids = rollouts.token_ids[b, 0][rollouts.completion_mask[b, 0]]
        with torch.no_grad():
            logits = own_logits(
                family, policy.model, policy.encoder.processor, batch.images[b][0], batch.prompts[b], ids
            )
        logits[:, policy.encoder.banned_token_ids] = -torch.inf
        assert torch.equal(logits.argmax(-1), ids)


def test_the_seed_decides(load: Load):
    policy = load()
    first, again, other = sample(policy, seed=1), sample(policy, seed=1), sample(policy, seed=2)
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(first.sampler_logps, again.sampler_logps)
    assert first.captions == again.captions
    assert not torch.equal(first.token_ids, other.token_ids)


# ── ends, lengths, padding ───────────────────────────────────────────────────────────────────────────


def test_packing_by_hand(load: Load):
    # 9 and 8 end a caption, the limit is 4 tokens
    encoder = load().encoder
    rows = [[5, 9, 0, 0], [5, 6, 7, 8], [5, 6, 7, 4], [9, 9, 5, 9], [8, 0, 0]]
    kept = [until_stop(torch.tensor(row), [8, 9]) for row in rows]
    logps = [-torch.arange(1.0, len(row) + 1) for row in rows]
    batch = batch_of([picture(56, 56)], ["Describe."])
    rollouts = pack(encoder, batch, [(list("abcde"), kept, logps)], [8, 9], 4, 3)
    assert rollouts.captions == [list("abcde")]
    mask = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    pad = encoder.tokenizer.pad_token_id
    tokens = [[5, 9, pad, pad], [5, 6, 7, 8], [5, 6, 7, 4], [9, pad, pad, pad], [8, pad, pad, pad]]
    assert rollouts.completion_mask.int().tolist() == [mask]
    assert rollouts.token_ids.tolist() == [tokens]
    assert rollouts.sampler_logps[0, 0].tolist() == [-1, -2, 0, 0]
    assert rollouts.truncated.tolist() == [[False, False, True, False, False]]
    assert rollouts.lengths.tolist() == [[1, 3, 4, 0, 0]]
    assert rollouts.weights_version == 3


@pytest.mark.parametrize("engine_size", [256, 4, 3, 1])
def test_images_are_told_as_their_captions_are_complete(load: Load, engine_size: int):
    policy, batch, told = load(), mixed_batch(), []
    engine = HFGenerate(engine_size)
    engine.attach(policy)
    rollouts = engine.generate(
        batch,
        policy.encode(batch),
        3,
        Sampling(max_tokens=5),
        lambda row, texts: told.append((row, list(texts))),
    )
    assert told == list(enumerate(rollouts.captions))


def check_ends(policy: Policy, rollouts: Rollouts, max_tokens: int) -> None:
    """What every rollout must satisfy, caption by caption."""
    tokenizer = policy.encoder.tokenizer
    own = policy.model.generation_config.eos_token_id
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    B, G, T = rollouts.token_ids.shape
    assert rollouts.completion_mask.shape == rollouts.sampler_logps.shape == (B, G, T)
    assert T == rollouts.completion_mask.sum(-1).max() <= max_tokens
    for b in range(B):
        for g in range(G):
            ids, mask = rollouts.token_ids[b, g].tolist(), rollouts.completion_mask[b, g].tolist()
            ends = [t for t, token in enumerate(ids) if token in stops]
            n = sum(mask)
            assert mask == [True] * n + [False] * (T - n)
            assert rollouts.truncated[b, g] == (not ends)
            assert n == (ends[0] + 1 if ends else max_tokens)
            assert rollouts.lengths[b, g] == n - bool(ends)
            assert rollouts.captions[b][g] == tokenizer.decode(ids[:n], skip_special_tokens=True).strip()
            assert set(ids[n:]) <= {tokenizer.pad_token_id}
            assert (rollouts.sampler_logps[b, g, n:] == 0).all()
            assert (rollouts.sampler_logps[b, g, :n] < 0).all()


@pytest.mark.parametrize("engine_size", [256, 9, 4, 2, 1])
def test_ends_lengths_and_turns(load: Load, engine_size: int, way: str, monkeypatch: pytest.MonkeyPatch):
    policy = load()
    bias(policy, [eos(policy)], 4.0)
    sizes = []
    turn = getattr(hf, "_turn" if way == "generate" or engine_size < 3 else "decode")

    def counted(*args):
        tokens, logps = turn(*args)
        sizes.append(len(tokens))
        return tokens, logps

    monkeypatch.setattr(hf, turn.__name__, counted)
    rollouts = sample(policy, engine_size=engine_size, max_tokens=10)
    assert sum(sizes) == 9
    assert max(sizes) <= engine_size
    whole_images = way == "decode" and engine_size >= 3
    assert len(sizes) == (-(-3 // (engine_size // 3)) if whole_images else -(-9 // engine_size))
    assert rollouts.token_ids.shape[:2] == (3, 3)
    assert rollouts.truncated.any()
    assert not rollouts.truncated.all()
    check_ends(policy, rollouts, 10)
    logps, _ = policy.logps(
        rollouts, policy.encode(rollouts.batch), [0, 1, 2]
    )  # each stands with its own image
    torch.testing.assert_close(rollouts.sampler_logps, logps, atol=1e-4, rtol=0)


def test_turns_of_different_lengths_are_padded(load: Load):
    policy = load()
    bias(policy, [eos(policy)], 5.5)
    drawn = [sample(policy, 1, engine_size=1, max_tokens=40, seed=seed) for seed in range(4)]
    assert any(len(set(rollouts.lengths.flatten().tolist())) > 1 for rollouts in drawn)
    for rollouts in drawn:
        check_ends(policy, rollouts, 40)


def test_captions_of_no_text(load: Load):
    policy = load()
    bias(policy, [eos(policy)], 100.0)
    rollouts = sample(policy, 2)
    assert rollouts.captions == [["", ""]] * 3
    assert rollouts.token_ids.shape == (3, 2, 1)
    assert rollouts.completion_mask.all(), "the end token was sampled, and is trained"
    assert (rollouts.lengths == 0).all()
    assert not rollouts.truncated.any()
    logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), [0, 1, 2])
    torch.testing.assert_close(rollouts.sampler_logps, logps, atol=1e-4, rtol=0)


def test_captions_without_an_end_are_truncated(load: Load):
    policy = load()
    bias(policy, [eos(policy), policy.encoder.tokenizer.pad_token_id], -100.0)
    rollouts = sample(policy, 2, max_tokens=5)
    assert rollouts.truncated.all()
    assert rollouts.completion_mask.all()
    assert (rollouts.lengths == 5).all()


def test_every_end_token_of_the_hub_ends_a_caption(load: Load, family: str):
    if family == "llava":
        pytest.skip("LLaVA has one end token")
    policy = load()
    second = policy.encoder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert second != eos(policy)
    bias(policy, [second], 100.0)
    rollouts = sample(policy, 2)
    assert (rollouts.token_ids == second).all()
    assert (rollouts.lengths == 0).all()
    policy.model.generation_config.eos_token_id = None  # a model that names none: the tokenizer's remains
    bias(policy, [second], -200.0)
    bias(policy, [eos(policy)], 100.0)
    assert (sample(policy, 2).lengths == 0).all()


def test_a_step_that_hf_drops_leaves_no_log_prob():
    # On Apple's GPUs HF learns one step late that all captions ended, and drops the last token.
    recorder = _Recorder([], 1.0)
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    prompt, drawn = torch.tensor([[1], [1]]), torch.tensor([[2, 3, 0], [4, 3, 0]])
    for t in range(3):
        recorder(torch.cat([prompt, drawn[:, :t]], 1), scores + t * torch.eye(5)[:2])
    kept = torch.cat([prompt, drawn[:, :2]], 1)
    recorder.finish(kept)
    logps = torch.cat(recorder.logps, 1)[:, :2]
    for t in range(2):
        expected = (scores + t * torch.eye(5)[:2]).log_softmax(-1).gather(1, drawn[:, t : t + 1])[:, 0]
        assert torch.equal(logps[:, t], expected)


def test_deferred_stops_of_hf_are_undone(load: Load, monkeypatch: pytest.MonkeyPatch):
    from transformers.generation import utils

    deferred = getattr(utils, "StopCheck", None)
    if deferred is None:
        pytest.skip("this transformers does not defer its stop check")

    class OneStepLate(deferred):
        late = False

        def __call__(self, unfinished: Tensor, tokens: Tensor, length: int) -> bool:
            stop, self.late = self.late, bool(unfinished.max() == 0)
            return stop

        def finish(self) -> int:
            return 1

    policy = load()
    bias(policy, [eos(policy)], 5.5)
    expected = sample(policy, max_tokens=60)
    assert not expected.truncated.any()
    monkeypatch.setattr(utils, "StopCheck", OneStepLate)
    rollouts = sample(policy, max_tokens=60)
    assert torch.equal(rollouts.token_ids, expected.token_ids)
    assert torch.equal(rollouts.sampler_logps, expected.sampler_logps)


def test_reference_lengths_are_tokens_of_the_policy(load: Load):
    policy = load()
    texts = ["A red circle lies to the left of a small blue square.", "", "The fox."]
    batch = mixed_batch()
    batch = replace(batch, references=texts)
    expected = [len(policy.encoder.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    rollouts = sample(policy, batch=batch)
    assert rollouts.reference_lengths.tolist() == expected
    assert rollouts.reference_lengths.dtype == rollouts.lengths.dtype == torch.long
    assert expected[1] == 0


# ── the engine ───────────────────────────────────────────────────────────────────────────────────────


def test_training_mode_is_restored(load: Load):
    policy = load()
    for mode in (True, False):
        policy.model.train(mode)
        sample(policy, 1, max_tokens=1)
        assert all(module.training is mode for module in policy.model.modules())
    policy.model.train()
    own = policy.model.generation_config

    def fails(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("no memory")

    policy.model.register_forward_pre_hook(fails)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        sample(policy, 1)
    assert policy.model.training
    assert policy.model.generation_config is own


def test_dropout_and_checkpointing_are_off_while_sampling(load: Load):
    settings = LoraSettings(target_modules=["q_proj"], r=2, dropout=0.5)
    policy = load(lora=settings, gradient_checkpointing=True)
    torch.nn.init.ones_(next(p for n, p in policy.model.named_parameters() if ".lora_B." in n))
    policy.model.train()
    steps = []
    policy.model.get_base_model().lm_head.register_forward_pre_hook(
        lambda m, args: steps.append(args[0].shape[1])
    )
    rollouts = sample(policy, 2, max_tokens=4)
    assert set(steps) == {1}, "one new token at a time, by the cache"
    policy.model.eval()
    logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), [0, 1, 2])
    torch.testing.assert_close(rollouts.sampler_logps, logps, atol=1e-4, rtol=0)


def test_training_goes_on_after_sampling(load: Load):
    policy = load(gradient_checkpointing=True)
    policy.model.train()
    rollouts = sample(policy)
    logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), [0, 1, 2])
    logps.sum().backward()
    torch.testing.assert_close(rollouts.sampler_logps, logps.detach(), atol=1e-4, rtol=0)
    gradients = [p.grad for p in policy.model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert not any(t.requires_grad for t in (rollouts.sampler_logps, rollouts.token_ids))


def test_sync_says_whose_weights_sampled(load: Load):
    policy, engine, batch = load(), HFGenerate(), mixed_batch()
    engine.attach(policy)
    prompts = policy.encode(batch)
    assert engine.generate(batch, prompts, 1, Sampling(max_tokens=1)).weights_version == 0
    engine.sync(policy, 7)
    bias(policy, [eos(policy)], 100.0)  # changed weights are sampled from at once
    rollouts = engine.generate(batch, prompts, 1, Sampling(max_tokens=1))
    assert rollouts.weights_version == 7
    assert (rollouts.lengths == 0).all()


def test_a_closed_engine_says_so(load: Load):
    policy, engine, batch = load(), HFGenerate(), mixed_batch()
    prompts = policy.encode(batch)
    with pytest.raises(RuntimeError, match="no policy; call attach and sync first"):
        engine.generate(batch, prompts, 1, Sampling())
    engine.attach(policy)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="no policy; call attach and sync first"):
        engine.generate(batch, prompts, 1, Sampling())


# ── each prompt once ─────────────────────────────────────────────────────────────────────────────────


def test_the_likeliest_captions_are_those_of_generate(load: Load, monkeypatch: pytest.MonkeyPatch):
    policy = load()
    bias(policy, [eos(policy)], 2.0)  # some end before others, and leave the batch
    monkeypatch.setattr(decode, "ROOM", 7)  # caches outgrow their room
    ours = sample(policy, 2, temperature=0.0, max_tokens=30)
    monkeypatch.setattr(hf, "can_decode", lambda model: False)
    theirs = sample(policy, 2, temperature=0.0, max_tokens=30)
    assert torch.equal(ours.token_ids, theirs.token_ids)
    torch.testing.assert_close(ours.sampler_logps, theirs.sampler_logps, atol=1e-5, rtol=0)
    assert torch.equal(ours.token_ids[:, 0], ours.token_ids[:, 1])


def test_prompts_are_read_once_and_ended_captions_leave(load: Load, way: str):
    policy = load()
    bias(policy, [eos(policy)], 4.0)
    shapes = []

    def record(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    policy.model.register_forward_pre_hook(record, with_kwargs=True)
    rollouts = sample(policy, 8, max_tokens=40)
    rows = [rows for rows, _ in shapes]
    if way == "generate":
        assert set(rows) == {24}
        return
    assert shapes[0][0] == 3
    assert rows[1] <= 24
    assert rows[1:] == sorted(rows[1:], reverse=True)
    under_way = [int((rollouts.completion_mask.sum(-1) > step).sum()) for step in range(1, len(rows))]
    assert all(alive <= size <= alive / 0.75 + 1 for alive, size in zip(under_way, rows[1:], strict=True))


def test_caches_are_copied_only_where_they_have_no_room(
    load: Load, way: str, monkeypatch: pytest.MonkeyPatch
):
    """transformers copies them for every token."""
    copied, copy = [], decode._with_room
    monkeypatch.setattr(decode, "_with_room", lambda *args: copied.append(args) or copy(*args))
    monkeypatch.setattr(decode, "ROOM", 10)
    policy = load()
    bias(policy, [eos(policy)], -100.0)  # none ends
    sample(policy, 2, max_tokens=30)
    layers = base_of(policy.model).config.get_text_config().num_hidden_layers
    # 29 tokens are seen: room for 11 is made at the 1st, the 12th and the 23rd; keys and values
    assert len(copied) == (2 * 3 * layers if way == "decode" else 0)
