"""Every tutorial is followed to the letter, in a folder that looks like a fresh clone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tutorial_shell, warm_python
from tests.support import ROOT
from tests.tutorial_shell import Block, blocks, missing_lines, outputs, script, write_programs

TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
CLONE = [
    path
    for path in ROOT.iterdir()
    if not path.name.startswith(".") and path.name not in ("runs", "data", "site")
]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment in which ``python`` is this interpreter, and the programs that are missing are checked."""
    folder = tmp_path_factory.mktemp("shell")
    programs = folder / "checked"
    programs.mkdir()
    write_programs(programs)
    with warm_python.started(Path(tutorial_shell.__file__), folder) as environment:
        yield {
            **os.environ,
            **environment,
            "PROGRAMS": str(programs),
            "COLUMNS": "120",
            "OMP_NUM_THREADS": "1",
        }


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for path in CLONE:
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def follow(tutorial: list[Block], clone: Path, shell: dict[str, str]) -> list[str]:
    """What each block printed."""
    done = subprocess.run(
        ["bash", "-c", script(tutorial, Path(shell["PROGRAMS"]))],
        cwd=clone,
        env=shell,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    printed = outputs(done.stdout)
    if done.returncode:
        stopped = tutorial[len(printed)]
        pytest.fail(f"line {stopped.line} ended with {done.returncode}:\n{stopped.text}\n{done.stdout}")
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial(path: Path, clone: Path, shell: dict[str, str]) -> None:
    tutorial = blocks(path.read_text())
    printed = follow(tutorial, clone, shell)
    assert len(printed) == len(tutorial)  # every block was executed, checked or written
    for block, before in zip(tutorial[1:], printed, strict=False):
        if block.kind == "output":
            assert not missing_lines(block.text, before), f"line {block.line}, in:\n{before}"


def test_blocks_of_every_kind(clone: Path, shell: dict[str, str]) -> None:
    tutorial = blocks(
        'In `a/mine.py`:\n\n```python title="a/mine.py"\nfour = 2 + 2\n```\n'
        "```bash\nname=a\npython -c 'import a.mine; print(f\"it is {a.mine.four} nats\")'\n```\n"
        "```text\nit is 5.25 nats\n```\n"
        "```bash\n# needs a GPU\ntorchrun --nproc_per_node 8 main.py fit --config configs/qwen7b.yaml\n"
        'pip install -e ".[vllm]"\n```\n'
    )
    assert [block.kind for block in tutorial] == ["file", "run", "output", "check"]
    printed = follow(tutorial, clone, shell)
    assert printed[1] == "it is 4 nats\n"
    assert not missing_lines(tutorial[2].text, printed[1])
    assert missing_lines("it is 5 bits\nit … nats\n", printed[1]) == ["it is 5 bits"]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("python main.py fit --config configs/qwen7b.yaml --model.nothing 1", "--model.nothing"),
        ("torchrun --nothing 8 main.py fit --config configs/qwen7b.yaml", "--nothing"),
        ("torchrun main.py fit --config configs/qwen7b.yaml --data.batch_size many", "data.batch_size"),
        ("srun --nodes 2 python main.py fit --config configs/qwen7b.yaml --trainer.node 2", "--trainer.node"),
        ("python main.py serve --config configs/qwen7b.yaml --model.policy.dtype none", "model.policy.dtype"),
        ("python main.py serve --config configs/qwen7b.yaml --model.nothing 1 & true", "--model.nothing"),
        ("python main.py fit --config nothing.yaml | cat", "nothing.yaml"),
        ('pip install -e ".[nothing]"', "has not all of the extras"),
        ("make nothing", "No rule to make target 'nothing'"),
        ("python train.py", "no check of: train.py"),
        ("nothing", "nothing: command not found"),
    ],
)
def test_a_command_that_is_checked_may_fail(
    command: str, why: str, clone: Path, shell: dict[str, str]
) -> None:
    with pytest.raises(pytest.fail.Exception, match="line 1 ended with") as failed:
        follow(blocks(f"```bash\n# needs a GPU\n{command}\n```\n"), clone, shell)
    assert why in str(failed.value).partition("\n\n")[2]  # in what it printed


@pytest.mark.parametrize(
    "fence", ["```", "```python", '```python title="mine.py"', '```bash title="a GPU"', "```console"]
)
def test_another_kind_of_block_is_refused(fence: str) -> None:
    with pytest.raises(ValueError, match="line 3: "):
        blocks(f"# Title\n\n{fence}\nls\n```\n")
