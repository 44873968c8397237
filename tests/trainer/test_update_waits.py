"""An update issues its work without reading what the device has made of it, but for the norm of each gradient."""

from __future__ import annotations

import pytest
import torch

from balcap.policy import checkpointing
from balcap.trainer.update import UpdateSettings, update
from tests.pretend_device import DEVICE, PretendDevice
from tests.support import optimizer_loop
from tests.tiny_models import mixed_batch, rollouts_of

LENGTHS = [[3, 1, 5], [7, 2, 2], [4, 6, 1]]
SETTINGS = UpdateSettings(kl_coef=0.1, updates_per_rollout=2, micro_batch_size=1)


def test_the_pretended_device_notices_who_waits() -> None:
    weight, mask = torch.ones(3, requires_grad=True), torch.tensor([True, False, True])
    with PretendDevice(weight) as device:
        moved = mask.to(DEVICE)
        assert moved.device == weight.device == (2 * weight).device == DEVICE
        assert mask.device == torch.ones(3)[mask].device == torch.device("cpu")
        assert device.waits == []
        float(weight.detach().sum()), weight[moved], weight.cpu(), moved.tolist()
        assert device.waits == ["_local_scalar_dense", "index", "cpu", "tolist"]
        torch.zeros(3, device=DEVICE).masked_scatter(moved, weight[:2]).sum().backward()
        assert device.waits[4:] == ["masked_scatter_backward"]


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_one_number_is_read_for_each_optimizer_step(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "device_memory", lambda device: (10**12, 10**12))
    policy = load(with_reference=True)
    rollouts = rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    prompts = policy.encode(rollouts.batch)
    policy.reference_logps(rollouts, prompts, [0, 1, 2])  # image features: towers of transformers wait
    advantages = torch.tensor([[1.0, -1.0, 0.0]]).repeat(3, 1)
    with PretendDevice(*policy.state_dict().values()) as device:
        device.put([features.embeds for features in prompts.features.values()])
        tally = update(policy, SETTINGS, rollouts, prompts, advantages, optimizer_loop(policy), 1.0, True)
        assert device.waits == ["_local_scalar_dense"] * 2  # the norm of each step's gradient
        means, largest = tally.means(), tally.largest()
        assert len(device.waits) <= 4
    assert means["grad_norm"] > 0
    assert 0 < means["kl"] < means["mismatch_mean"] <= largest["mismatch_max"]
