"""What a run folder says of settings that were changed."""

from __future__ import annotations

from callbacks.run_config import changed_settings


def test_a_change_is_named_by_its_own_key_also_within_a_list_of_objects() -> None:
    before = """
    ckpt_path: null
    trainer: {max_steps: 2, callbacks: null}
    rewards: [{class_path: a.B, init_args: {limit: 64, names: [x, y]}}, {class_path: a.C}]
    """
    now = """
    ckpt_path: last
    trainer: {max_steps: 2, callbacks: null}
    rewards: [{class_path: a.B, init_args: {limit: null, names: [x, z]}}, {class_path: a.C}, {class_path: a.D}]
    """
    assert changed_settings(before, now) == [
        "rewards[0].init_args.limit 64 -> None",
        "rewards[0].init_args.names ['x', 'y'] -> ['x', 'z']",
        "rewards[2].class_path None -> a.D",
    ]
    assert changed_settings(before, before) == []
