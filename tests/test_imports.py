"""Who may import whom: no circles, and imports go down only."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        "balcap", "callbacks", "examples", include_external_packages=True, exclude_type_checking_imports=True
    )


def test_there_is_no_import_circle(graph: grimp.ImportGraph) -> None:
    modules = [
        module for module in graph.modules if module.split(".")[0] in ("balcap", "callbacks", "examples")
    ]
    assert len(modules) > 100
    try:
        TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in modules}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        (
            "balcap.algorithms",
            ["balcap.trainer", "balcap.module", "balcap.judge", "balcap.rewards", "lightning"],
        ),
        (
            "balcap.policy",
            ["balcap.trainer", "balcap.module", "balcap.judge", "balcap.rewards", "balcap.rollout"],
        ),
        ("balcap.rewards", ["balcap.trainer", "balcap.module", "balcap.policy", "balcap.rollout"]),
        ("balcap.judge", ["balcap.trainer", "balcap.module", "balcap.rewards", "balcap.policy", "torch"]),
        (
            "balcap.data",
            ["balcap.trainer", "balcap.module", "balcap.judge", "balcap.rewards", "balcap.policy"],
        ),
        ("balcap.rollout", ["balcap.trainer", "balcap.module", "balcap.judge", "balcap.rewards"]),
        ("balcap.trainer", ["balcap.module", "balcap.cli", "balcap.commands", "callbacks"]),
        ("balcap.utils", ["balcap.trainer", "balcap.module", "balcap.judge", "balcap.data", "balcap.policy"]),
        ("balcap", ["examples"]),
        ("callbacks", ["examples"]),
    ],
)
def test_imports_go_down_only(graph: grimp.ImportGraph, package: str, forbidden: list[str]) -> None:
    modules = {package} | graph.find_descendants(package)
    imported = {
        (module, other)
        for module in modules
        for other in graph.find_modules_directly_imported_by(module)
        for name in forbidden
        if other == name or other.startswith(f"{name}.")
    }
    assert imported == set()


def test_litellm_is_imported_in_one_file(graph: grimp.ImportGraph) -> None:
    users = {m for m in graph.modules if "litellm" in graph.find_modules_directly_imported_by(m)}
    assert {user for user in users if user.startswith(("balcap", "callbacks"))} == {"balcap.judge.models"}
