"""The documentation's site: it builds strictly, loads nothing from elsewhere, and its API pages leave nothing out."""

from __future__ import annotations

import re
import zlib
from contextlib import nullcontext
from importlib import import_module
from inspect import getmembers, isclass
from pathlib import Path
from pkgutil import iter_modules
from shutil import copytree

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from tests.support import ROOT

PACKAGES = ["algorithms", "rewards", "judge", "judge.tasks", "policy", "rollout", "data", "benchmarks"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out), strict=True))
    return out


def _rendered(site: Path) -> set[str]:
    """Names of everything on the API pages: Sphinx's inventory, which other projects would link to."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}


def test_what_the_packages_export_is_on_the_api_pages(site: Path) -> None:
    exported = [
        f"{member.__module__}.{member.__qualname__}"
        for package in map(import_module, [f"balcap.{name}" for name in PACKAGES])
        for member in (getattr(package, name) for name in package.__all__)
    ]
    assert len(exported) > 60
    assert sorted(set(exported) - _rendered(site)) == []


@pytest.mark.parametrize("package", ["balcap.trainer", "callbacks"])
def test_so_are_the_classes_of_packages_that_export_nothing(site: Path, package: str) -> None:
    names = [f"{package}.{module.name}" for module in iter_modules(import_module(package).__path__)]
    classes = {
        f"{one.__module__}.{one.__qualname__}"
        for module in map(import_module, names)
        for name, one in getmembers(module, isclass)
        if one.__module__ == module.__name__ and not name.startswith("_")
    }
    assert len(classes) > 8
    assert sorted(classes - _rendered(site)) == []


def test_types_and_the_step_are_on_the_api_pages(site: Path) -> None:
    step = {f"balcap.types.{name}" for name in ("CaptionBatch", "Rollouts", "StepRecord", "Cursor")}
    assert {"balcap.module.BalCapModule", *step} <= _rendered(site)


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [
            page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)
        ]

    navigation = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    files = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(navigation) == sorted(files | {"readme.md", "contributing.md"})


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]*)", page.read_text())
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text()):
        assert (site / picture).read_bytes() == (ROOT / picture).read_bytes()
        assert f'src="{picture}"' in (site / "readme.html").read_text()


def test_links_to_code_become_paths_while_the_repository_has_no_address(site: Path) -> None:
    papers, overview = (site / "papers.html").read_text(), (site / "readme.html").read_text()
    assert "<code>balcap/algorithms/cgdpo.py</code>" in papers
    assert 'href="rollouts.html#before-a-run"' in overview
    assert 'href="../' not in papers + overview


@pytest.mark.parametrize(
    ("link", "warnings"),
    [
        ("data.md#bad-rows", 0),
        ("../balcap/types.py", 0),
        ("missing.md", 1),
        ("data.md#nowhere", 1),
        ("../balcap/nowhere.py", 1),
        ("../nowhere/", 1),
    ],
)
def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path, link: str, warnings: int) -> None:
    copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs/index.md").open("a") as page:
        page.write(f"\n[one more link]({link})\n")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config |= {"plugins": [], "hooks": [str(ROOT / "docs/hooks.py")]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    strict = load_config(str(tmp_path / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    with pytest.raises(Abort, match=f"Aborted with {warnings} warnings") if warnings else nullcontext():
        build(strict)
