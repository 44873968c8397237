"""One call of generate on a vLLM engine in this process: its requests, its steps, and the ranks that share them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm_worker import ADAPTER_ID

KEY = "model.engine.init_args"


@dataclass(frozen=True)
class Request:
    """One image to caption, as it travels between ranks.

    Attributes:
        sample_id: for messages.
        prompt: token ids, with one image token.
        image: what the policy sees.
        settings: keyword arguments of ``SamplingParams``.
    """

    sample_id: str
    prompt: Sequence[int]
    image: Image.Image
    settings: dict[str, Any]


class Ranks:
    """The consecutive ranks that share one engine by tensor parallelism; with `size` 1 there is nothing to share.

    Every rank of them takes the same requests, in the same order, and the same steps.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def check(self) -> None:
        """EngineFailed where the run's ranks do not come out even."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % self.size:
            raise EngineFailed(
                f"{KEY}.tensor_parallel_size: {self.size} does not divide the run's ranks, {world}; change it or "
                "trainer.devices, or spread the model over devices of its own with "
                "balcap.rollout.vllm_server.VLLMServer"
            )

    def union(self, mine: list[Request]) -> tuple[list[Request], int]:
        """The requests of all these ranks, and where among them this rank's own begin."""
        if self.size == 1:
            return mine, 0
        group = self._group()
        everyone: list[list[Request]] = [[]] * self.size
        dist.all_gather_object(everyone, mine, group=group.cpu_group)
        return [one for part in everyone for one in part], sum(map(len, everyone[: group.rank_in_group]))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any of these ranks."""
        if self.size == 1:
            return flag
        said = torch.tensor([float(flag)])
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group().cpu_group)
        return bool(said)

    def _group(self) -> Any:
        from vllm.distributed.parallel_state import get_tp_group

        return get_tp_group()


def check_lengths(llm: Any, requests: Sequence[Request], prompt_tokens: Sequence[int]) -> None:
    """EngineFailed where vLLM would cut captions at its own limit, unnoticed.

    Args:
        prompt_tokens: ``[B]`` of each request, image tokens expanded.
    """
    limit = llm.llm_engine.model_config.max_model_len
    for request, tokens in zip(requests, prompt_tokens, strict=True):
        longest = request.settings["max_tokens"]
        if tokens + longest > limit:
            raise EngineFailed(
                f"sample {request.sample_id!r}: its prompt and a caption of model.sampling.max_tokens: {longest} make "
                f"{tokens + longest} tokens, vLLM's limit is {limit}; raise {KEY}.max_model_len (null: the model's "
                "own), or lower model.policy.max_pixels or model.sampling.max_tokens"
            )


def run(
    llm: Any,
    requests: Sequence[Request],
    adapted: bool,
    deadline_s: float,
    ranks: Ranks,
    complete: Callable[[int, Any], None],
) -> None:
    """Caption all requests; whatever happens, none of them is left in the engine.

    Args:
        llm: a ``vllm.LLM``.
        adapted: with the adapter that the worker holds.
        deadline_s: seconds for all of it.
        complete: told of each request, by its index, and vLLM's ``RequestOutput`` when its captions are complete.

    Raises:
        EngineFailed: too slow, or vLLM failed.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    deadline = time.monotonic() + deadline_s
    prompts = [
        {"prompt_token_ids": list(one.prompt), "multi_modal_data": {"image": one.image}} for one in requests
    ]
    params = [SamplingParams(**one.settings) for one in requests]
    adapter = LoRARequest("policy", ADAPTER_ID, "in memory") if adapted else None
    try:
        ids = llm.enqueue(prompts, params, lora_request=adapter, use_tqdm=False)
    except Exception as error:
        raise _failed(error) from error
    # Newer versions append a random part to the id that outputs carry.
    waiting = {str(request_id).split("-")[0]: index for index, request_id in enumerate(ids)}
    try:
        for output in _steps(llm.llm_engine, ranks, deadline):
            complete(waiting.pop(output.request_id), output)
        if waiting:
            raise EngineFailed(
                f"vLLM has captioned {len(requests) - len(waiting)} of {len(requests)} images after {deadline_s:g} s; "
                f"raise {KEY}.deadline_s, or lower model.sampling.max_tokens, model.num_captions or data.batch_size"
            )
    finally:
        if waiting:
            llm.llm_engine.abort_request(list(waiting))


def _steps(engine: Any, ranks: Ranks, deadline: float) -> Iterator[Any]:
    """Outputs, each as soon as all captions of its image are complete; no more after the deadline."""
    while engine.has_unfinished_requests() and not ranks.any(time.monotonic() > deadline):
        try:
            outputs = engine.step()
        # A step fails in as many ways as a model can; none of them leaves an engine to go on with.
        except Exception as error:
            raise _failed(error) from error
        yield from (output for output in outputs if output.finished)


def _failed(error: Exception) -> EngineFailed:
    if "does not use offset" in str(error):  # see balcap.rollout.vllm_start.whole_prompts
        return EngineFailed(
            f"vLLM on a CPU cannot split the prompts of a batch; set {KEY}.max_model_len to at most 32768, or lower "
            "data.batch_size"
        )
    return EngineFailed(
        f"vLLM failed while sampling: {type(error).__name__}: {error}. Out of memory: lower "
        f"{KEY}.gpu_memory_utilization or data.batch_size; else see VLLM_LOGGING_LEVEL=INFO"
    )
