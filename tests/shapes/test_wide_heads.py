"""The base policy with wider heads is the same policy."""

from __future__ import annotations

from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from tests.tiny_models import batch_of, picture, rollouts_of
from tests.wide_heads import BASE, widened


def test_log_probs_are_the_same_and_what_was_added_does_not_learn() -> None:
    policy = Policy.load(PolicyConfig(str(BASE), dtype="float32"), with_reference=False)
    batch = batch_of([picture(112, 112), picture(84, 140)], ["Describe this image.", "What is there?"])
    rollouts = rollouts_of(batch, [[9, 4], [7, 12]], range(20, 600))
    prompts = policy.encode(batch)
    wide = Policy(widened(policy.model), policy.encoder)
    text = wide.model.config.text_config
    assert text.hidden_size // text.num_attention_heads == 64
    narrow_logps, _ = policy.logps(rollouts, prompts, [0, 1])
    wide_logps, _ = wide.logps(rollouts, policy.encode(batch), [0, 1])
    assert (wide_logps - narrow_logps).abs().max() < 2e-4
    wide_logps.sum().backward()
    hidden = policy.model.config.text_config.hidden_size
    gradients = {n: p.grad for n, p in wide.model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        if "language_model" in name and name.endswith(
            ("gate_proj.weight", "up_proj.weight", "q_proj.weight", "embed_tokens.weight")
        ):
            assert gradient[:, :hidden].abs().max() > 0
            assert gradient[:, hidden:].abs().max() == 0
