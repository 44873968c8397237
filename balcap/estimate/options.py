"""What the command is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Launch:
    """How the run would be started, as the config says; estimating itself starts nothing.

    Attributes:
        devices, num_nodes, accelerator, max_time: of the trainer.
        ckpt_path: of ``fit``.
    """

    devices: Any
    num_nodes: int
    accelerator: str
    max_time: Any = None
    ckpt_path: Any = None


@dataclass(frozen=True)
class Options:
    """What replaces assumptions; the flags of the command, which documents them."""

    rows: int = 64
    ranks: int | None = None
    sample_policy: bool = False
    caption_tokens: int | None = None
    words_per_assertion: float | None = None
    growth: float | None = None
    chars_per_token: float | None = None
    image_tokens: int | None = None
    reasoning_tokens: int | None = None
    ledger: str | None = None

    def problems(self) -> list[str]:
        """What is out of range, each with the flag to change."""
        rules = {
            "rows": self.rows >= 1,
            "ranks": self.ranks is None or self.ranks >= 1,
            "caption_tokens": self.caption_tokens is None or self.caption_tokens >= 1,
            "words_per_assertion": self.words_per_assertion is None or self.words_per_assertion > 0,
            "growth": self.growth is None or 0 <= self.growth <= 1,
            "chars_per_token": self.chars_per_token is None or self.chars_per_token > 0,
            "image_tokens": self.image_tokens is None or self.image_tokens >= 0,
            "reasoning_tokens": self.reasoning_tokens is None or self.reasoning_tokens >= 0,
        }
        wrong = [name for name, holds in rules.items() if not holds]
        found = [f"{name}: {getattr(self, name)} is out of range" for name in wrong]
        if self.ledger is not None and not Path(self.ledger).is_file():
            found.append(f"ledger: {self.ledger} does not exist")
        return found
