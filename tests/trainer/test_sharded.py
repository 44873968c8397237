"""An update of a policy that is sharded (FSDP2) is that of one process, whatever each rank has to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.sharded_ranks import KINDS
from tests.support import ROOT
from tests.tiny_families import FAMILIES

CASES = 200


@st.composite
def case(draw: st.DrawFn) -> dict[str, Any]:
    """Images of two ranks with captions of any lengths, groups without spread among them; sometimes a row whose loss is
    not finite."""
    images, captions = draw(st.sampled_from([3, 2, 1])), draw(st.integers(2, 3))
    group = st.lists(st.integers(1, 12), min_size=captions, max_size=captions)
    reward = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")])
    of_caption = st.lists(reward, min_size=2, max_size=2)
    flat = draw(st.lists(st.sampled_from([False, True, False]), min_size=2 * images, max_size=2 * images))
    rewards = [
        [[0.5, 0.5]] * captions if no_spread else [draw(of_caption) for _ in range(captions)]
        for no_spread in flat
    ]
    return {
        "lengths": [draw(group) for _ in range(2 * images)],
        "rewards": rewards,
        "bad_row": draw(st.sampled_from([None] * 9 + [0])),
        "seed": draw(st.integers(0, 99)),
        "settings": {
            "kl_coef": draw(st.sampled_from([0.0, 0.1])),
            "loss_aggregation": draw(st.sampled_from(["token_mean", "sequence_mean"])),
            "updates_per_rollout": draw(st.sampled_from([1, 1, 2])),
            "micro_batch_size": draw(st.sampled_from([1, None, 1, 2])),
            "max_tokens_per_forward": draw(st.sampled_from([None, 40, 80])),
            "max_grad_norm": draw(st.sampled_from([0.5, 0.05])),
        },
    }


def cases(count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case())
    def collect(one: dict[str, Any]) -> None:
        found.append(one)

    collect()
    return [{"kind": kind, **one} for kind, one in zip(cycle(KINDS), found)]


def tied(folder: Path, to: Path, with_head: bool) -> Path:
    """The model with a head that is its embedding; `with_head`: weights of its own lie beside, which then count."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (to / "config.json").write_text(json.dumps(config))
    weights = load_file(to / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if with_head or name != "lm_head.weight"}
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.slow
def test_updates_are_those_of_one_process(folders: dict[str, Path], tmp_path: Path) -> None:
    where = {**folders, "tied": tied(folders["qwen"], tmp_path / "tied", with_head=False)}
    where["tied but for its weights"] = tied(folders["qwen"], tmp_path / "both", with_head=True)
    where["experts"] = FAMILIES["qwen3_vl_moe"](tmp_path / "experts")
    drawn = cases(CASES)
    (tmp_path / "cases.json").write_text(json.dumps({"folders": where, "cases": drawn}, default=str))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharded_ranks", str(tmp_path), str(rank)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=1800)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-3000:] for text in said)
    for rank in range(2):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report["problems"] == []
        assert report["cases"] == len(drawn) >= CASES * 0.9
        assert report["ragged"] > CASES // 10  # ranks with fewer passes than others
        assert report["moved"] > CASES // 2  # these updates did something
