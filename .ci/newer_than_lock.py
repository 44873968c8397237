"""Prints the packages of this environment whose version is not the one in requirements.lock."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"


def main() -> None:
    pinned: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK.read_text(), re.MULTILINE):
        pinned.setdefault(name, set()).add(version)
    rows = [
        f"{name:24} {', '.join(sorted(versions)):16} {here}"
        for name, versions in sorted(pinned.items())
        if (here := installed(name)) is not None and here not in versions
    ]
    print("\n".join([f"{'package':24} {'locked':16} tested", *rows] if rows else ["as in requirements.lock"]))


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
