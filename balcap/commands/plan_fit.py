"""What lies on a GPU in each stage of a run, and what to change where that is too much: arithmetic on settings."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from balcap.policy.checkpointing import MARGIN, forward_fits, layers_to_checkpoint, room_for_forward
from balcap.policy.memory import Forward, UpdateCosts
from balcap.rollout.memory import VLLM_REST, Work, on_the_policy

Parts = dict[str, int]
"""What it is -> bytes."""


@dataclass(frozen=True)
class Weights:
    """A policy, as it is trained and sampled.

    Attributes:
        costs: of an update.
        engine: bytes of vLLM's own copy of the base.
        kv: bytes of a token's keys and values in the engine.
    """

    costs: UpdateCosts
    engine: int
    kv: int


@dataclass(frozen=True)
class Setup:
    """What decides about memory.

    Attributes:
        weights: the policy.
        device: bytes of the GPU.
        images, val_images: on each GPU and step, of training and of validation; 0 where nothing is sampled there.
        captions, val_captions: of each image.
        prompt: tokens of a prompt, those of its image included.
        image_tokens: of them.
        longest: tokens of a caption.
        shared_prefix: whether prompts are forwarded and read once for their captions.
        checkpointing, max_tokens, micro_batch: of the update, as in the config.
        buckets: whether DDP keeps the gradients once more.
        gathers: whether ranks share the weights, and gather them where they are used.
        engine: ``policy`` samples itself, ``vllm`` lies beside it, or captions come from ``elsewhere``.
        max_sequences, shared_prompts: of sampling on the policy.
        share: of the GPU for vLLM.
        sleeps: whether vLLM gives its share back during updates.
        max_model_len: longest sequence that vLLM is started for.
        parallel: GPUs that share an engine.
        pixels: area of the largest image that the processor makes; 0 where no setting changes that.
        has_adapter: whether an adapter is trained.
    """

    weights: Weights
    device: int
    images: int
    val_images: int
    captions: int
    val_captions: int
    prompt: int
    image_tokens: int
    longest: int
    shared_prefix: bool = True
    checkpointing: bool | Literal["auto"] = "auto"
    max_tokens: int | Literal["auto"] | None = "auto"
    micro_batch: int | None = None
    buckets: bool = False
    gathers: bool = False
    engine: Literal["policy", "vllm", "elsewhere"] = "policy"
    max_sequences: int = 256
    shared_prompts: bool = True
    share: float = 0.4
    sleeps: bool = True
    max_model_len: int = 0
    parallel: int = 1
    pixels: int = 0
    has_adapter: bool = False

    @property
    def limit(self) -> float:
        """Bytes that a run may hold: what `auto` allows itself, too."""
        return (1 - MARGIN) * self.device

    @property
    def work(self) -> Work:
        """What training samples in a step."""
        return Work(self.images, self.captions, self.prompt, self.image_tokens, self.longest)

    def forward(self, images: int) -> Forward:
        """The largest forward of so many images with all their captions."""
        return Forward.of_images(
            images, self.prompt, self.image_tokens, self.captions, self.longest, self.shared_prefix
        )


@dataclass(frozen=True)
class Update:
    """How an update goes through its images.

    Attributes:
        images: in one forward.
        forwards: of an update.
        checkpointed: layers.
        parts: at its worst moment.
    """

    images: int
    forwards: int
    checkpointed: int
    parts: Parts


def room_of(setup: Setup) -> float:
    """Bytes for a forward and its backward, beside all gradients and the optimizer's state."""
    costs = setup.weights.costs
    there = costs.weights + costs.reference + sum((_asleep(setup) | _buckets(setup)).values())
    return room_for_forward(costs, setup.device - there, setup.device, 0, False)


def update_of(setup: Setup) -> Update:
    """As `balcap.policy.checkpointing` decides where the config leaves it open."""
    costs, room = setup.weights.costs, room_of(setup)
    always = setup.checkpointing is True

    def fits(images: int) -> bool:
        if setup.max_tokens == "auto":
            return forward_fits(costs, setup.forward(images), room, always)
        return setup.forward(images).tokens <= (setup.max_tokens or math.inf)

    most = min(setup.micro_batch or setup.images, setup.images)
    images = max((count for count in range(2, most + 1) if fits(count)), default=1)
    forward = setup.forward(images)
    if setup.checkpointing == "auto":
        checkpointed = layers_to_checkpoint(costs, [forward], room)
    else:
        checkpointed = costs.layers if always else 0
    forwards = math.ceil(setup.images / images)
    parts = costs.estimate(forward, checkpointed).peak(first=forwards == 1)
    return Update(images, forwards, checkpointed, parts | _asleep(setup) | _buckets(setup))


def longest_forward(setup: Setup, checkpointed: int) -> int:
    """Most images that fit into one forward with so many layers checkpointed; 0 where none does."""
    costs, room = setup.weights.costs, room_of(setup)

    def too_many(images: int) -> bool:
        return costs.estimate(setup.forward(images), checkpointed).forward > room

    return bisect_left(range(1, 10**6), True, key=too_many)


def stages(setup: Setup) -> dict[str, Parts]:
    """Stage -> what lies on the GPU at its worst moment."""
    found = {}
    if setup.captions > 1:  # else it learns references
        found["rollout"] = _between_updates(setup) | _sampling(setup, setup.work)
    if setup.val_images:
        work = replace(setup.work, images=setup.val_images, captions=setup.val_captions)
        found["validation"] = _between_updates(setup) | _sampling(setup, work)
    found["update"] = update_of(setup).parts
    return found


def excess(setup: Setup) -> int:
    """Bytes that are missing, over all stages, and for vLLM to start; 0 where the run fits."""
    missing = sum(max(0, sum(parts.values()) - int(setup.limit)) for parts in stages(setup).values())
    if setup.engine == "vllm":
        missing += max(0, setup.max_model_len - cache_tokens(setup)) * setup.weights.kv
    return missing


def cache_tokens(setup: Setup) -> int:
    """Tokens whose keys and values vLLM has room for; negative where its share does not hold its weights."""
    left = setup.share * setup.device - setup.weights.engine / setup.parallel - VLLM_REST
    return int(left * setup.parallel / setup.weights.kv)


def engine_problem(setup: Setup) -> str:
    """Why vLLM would not start; empty where it would."""
    if setup.engine != "vllm" or (room := cache_tokens(setup)) >= setup.max_model_len:
        return ""
    if room < setup.prompt + setup.longest:
        return (
            f"vLLM does not start: {setup.share:g} of the GPU hold its weights and {max(0, room):,} tokens of keys and "
            f"values, a prompt and its caption are {setup.prompt + setup.longest:,}"
        )
    return (
        f"vLLM does not start: beside its weights {setup.share:g} of the GPU hold {room:,} tokens of keys and values, fewer "
        f"than its longest sequence, {setup.max_model_len:,} (model.engine.init_args.max_model_len)"
    )


def _between_updates(setup: Setup) -> Parts:
    """Gradients lie there until the next update begins."""
    costs = setup.weights.costs
    parts = {name: getattr(costs, name) for name in ("weights", "reference", "optimizer", "gradients")}
    return parts | _buckets(setup)


def _buckets(setup: Setup) -> Parts:
    return {"buckets": setup.weights.costs.gradients} if setup.buckets else {}


def _asleep(setup: Setup) -> Parts:
    if setup.engine != "vllm":
        return {}
    return {"engine": int(VLLM_REST if setup.sleeps else setup.share * setup.device)}


def _sampling(setup: Setup, work: Work) -> Parts:
    weights = setup.weights
    if setup.engine == "policy":
        shared = setup.shared_prefix and setup.shared_prompts
        parts = on_the_policy(weights.costs, weights.kv, work, setup.max_sequences, shared)
        return {"casts": weights.costs.casts} | parts
    return {"engine": int(setup.share * setup.device)} if setup.engine == "vllm" else {}


# ── what to change ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Change:
    """A setting, changed.

    Attributes:
        flags: that change it.
        setup: with it.
    """

    flags: str
    setup: Setup


Other = Callable[[bool], Weights | None]
"""The policy with an adapter, its base in 4 bits or not; None where it is that already."""

WaysOf = Callable[[Setup, Other], list[Change]]
"""The ways to change one setting, the mildest first."""


def changes(setup: Setup, other: Other) -> list[Change]:
    """Each setting that saves memory where it is missing, changed alone: by as little as saves most of it. First what
    changes nothing that is learned."""
    return [found for ways in WAYS if (found := _best(setup, ways(setup, other)))]


def combined(setup: Setup, other: Other) -> list[Change]:
    """Changes one on the other until the run fits, none of them in vain; all where it does not fit then."""
    made, ways = _one_on_the_other(setup, other, WAYS), list(WAYS)
    if not _fits(made):
        return made
    for way in reversed(WAYS):  # what changes most is left out first
        fewer = [one for one in ways if one is not way]
        if _fits(_one_on_the_other(setup, other, fewer)):
            ways = fewer
    milder = _one_on_the_other(setup, other, ways[::-1])  # what the others leave to save may be little
    return milder if _fits(milder) else _one_on_the_other(setup, other, ways)


def _one_on_the_other(setup: Setup, other: Other, all_ways: Sequence[WaysOf]) -> list[Change]:
    made: list[Change] = []
    for ways in all_ways:
        if excess(setup) and (found := _best(setup, ways(setup, other))):
            made.append(found)
            setup = found.setup
    return made


def _fits(made: Sequence[Change]) -> bool:
    return bool(made) and not excess(made[-1].setup)


def _best(setup: Setup, ways: Sequence[Change]) -> Change | None:
    """The first of those that save most; None where none saves anything."""
    best = min(ways, key=lambda way: excess(way.setup), default=None)
    return best if best and excess(best.setup) < excess(setup) else None


def _checkpointing(setup: Setup, other: Other) -> list[Change]:
    if setup.checkpointing is not False:
        return []
    return [Change("--model.policy.gradient_checkpointing true", replace(setup, checkpointing=True))]


def _max_tokens(setup: Setup, other: Other) -> list[Change]:
    sizes = (setup.forward(images).tokens for images in range(update_of(setup).images - 1, 0, -1))
    return [Change(f"--model.max_tokens_per_forward {n}", replace(setup, max_tokens=n)) for n in sizes]


def _sleep(setup: Setup, other: Other) -> list[Change]:
    if setup.engine != "vllm" or setup.sleeps:
        return []
    return [Change(f"--{ENGINE}.sleep true", replace(setup, sleeps=True))]


def _max_model_len(setup: Setup, other: Other) -> list[Change]:
    longest = 256 * math.ceil((setup.prompt + setup.longest) / 256)
    if setup.engine != "vllm" or longest >= setup.max_model_len:
        return []
    return [Change(f"--{ENGINE}.max_model_len {longest}", replace(setup, max_model_len=longest))]


def _share(setup: Setup, other: Other) -> list[Change]:
    if setup.engine != "vllm":
        return []
    shares = sorted((n / 20 for n in range(2, 19)), key=lambda share: abs(share - setup.share))
    ways = [Change(f"--{ENGINE}.gpu_memory_utilization {n:g}", replace(setup, share=n)) for n in shares]
    return [way for way in ways if not engine_problem(way.setup)]


def _max_sequences(setup: Setup, other: Other) -> list[Change]:
    if setup.engine != "policy":
        return []
    most = min(setup.max_sequences, max(setup.images * setup.captions, setup.val_images * setup.val_captions))
    least = max(setup.captions, setup.val_captions)
    counts = range(most - most % least, least - 1, -least)
    return [Change(f"--{ENGINE}.max_sequences {n}", replace(setup, max_sequences=n)) for n in counts]


def _num_captions(setup: Setup, other: Other) -> list[Change]:
    counts = range(setup.captions - 1, 1, -1)
    return [Change(f"--model.num_captions {n}", replace(setup, captions=n)) for n in counts]


def _max_pixels(setup: Setup, other: Other) -> list[Change]:
    found = []
    for eighths in range(7, 1, -1) if setup.pixels else ():
        tokens, pixels = (count * eighths // 8 for count in (setup.image_tokens, setup.pixels))
        prompt = setup.prompt - setup.image_tokens + tokens
        fewer = replace(setup, image_tokens=tokens, prompt=prompt, pixels=pixels)
        found.append(Change(f"--model.policy.max_pixels {pixels}", fewer))
    return found


def _lora(setup: Setup, other: Other) -> list[Change]:
    weights = None if setup.has_adapter else other(False)
    if weights is None:
        return []
    return [Change("--model.policy.lora.r 64", replace(setup, weights=weights, has_adapter=True))]


def _four_bits(setup: Setup, other: Other) -> list[Change]:
    if setup.gathers or (weights := other(True)) is None:
        return []
    flags = ("" if setup.has_adapter else "--model.policy.lora.r 64 ") + "--model.policy.load_in_4bit true"
    return [Change(flags, replace(setup, weights=weights, has_adapter=True))]


ENGINE = "model.engine.init_args"

WAYS = (
    _checkpointing, _max_tokens, _sleep, _max_model_len, _share, _max_sequences,
    _num_captions, _max_pixels, _lora, _four_bits,
)  # fmt: skip
"""By how much they change: first those that change nothing that is learned."""
