"""What the estimate prints, and writes as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from balcap.estimate.forecast import Forecast
from balcap.estimate.usage import Key, Usage, Usages
from balcap.judge.client import Price

PriceOf = Callable[[str], Price | None]


@dataclass(frozen=True)
class Note:
    """An assumption.

    Attributes:
        text: what is assumed.
        change: the flag or key that changes it; "" for none.
    """

    text: str
    change: str = ""


@dataclass(frozen=True)
class Report:
    """An estimate.

    Attributes:
        forecast: of the run as it is configured.
        other: of the same run with the other grouping, and that grouping's name.
        price_of: model -> its price, None if unknown.
        notes: assumptions.
        budget_usd: of the judge.
    """

    forecast: Forecast
    other: tuple[str, Forecast]
    price_of: PriceOf
    notes: Sequence[Note]
    budget_usd: float | None = None

    def usd(self, used: Usages) -> float | None:
        """Dollars, None where the price of a model is unknown that is used."""
        parts = [self._usd(key, usage) for key, usage in used.items()]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _usd(self, key: Key, usage: Usage) -> float | None:
        price = self.price_of(key[1])
        return None if price is None else price.usd(usage.tokens_in, usage.tokens_out, 0)  # type: ignore[arg-type]

    @property
    def unpriced(self) -> list[str]:
        """Models without a price."""
        return sorted({model for _, model in self.forecast.used if self.price_of(model) is None})

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; dollars are null where a price is unknown."""
        forecast, plan, other = self.forecast, self.forecast.plan, self.other[1]
        usd = self.usd(forecast.used)
        rollouts = forecast.rollouts
        return {
            "tasks": [
                {"task": key[0], "model": key[1], **_plain(usage), "usd": self._usd(key, usage)}
                for key, usage in sorted(forecast.used.items())
            ],
            "total": {**_plain(forecast.used.all), "usd": usd},
            "training": {**_plain(forecast.train.all), "usd": self.usd(forecast.train)},
            "validation": {**_plain(forecast.val.all), "usd": self.usd(forecast.val)},
            "usd_per_1k_rollouts": None if usd is None or not rollouts else 1000 * usd / rollouts,
            "rollouts": rollouts,
            "batches": plan.batches,
            "images_per_batch": plan.images_per_batch,
            "train_rows": plan.train_rows,
            "validations": list(plan.validations),
            "val_images": plan.val_images,
            "sampling_error": forecast.course.error(),
            self.other[0]: {**_plain(other.used.all), "usd": self.usd(other.used)},
            "budget_usd": self.budget_usd,
            "budget_spent_at_step": self._budget_step(),
            "unpriced_models": self.unpriced,
            "assumptions": [{"text": note.text, "change": note.change} for note in self.notes],
        }

    def _budget_step(self) -> int | None:
        if self.budget_usd is None or self.unpriced:
            return None
        return self.forecast.step_of(self.budget_usd, lambda used: self.usd(used) or 0.0)

    def show(self, console: Console) -> None:
        """Table, totals and assumptions."""
        forecast, plan = self.forecast, self.forecast.plan
        trained, validated = forecast.captions
        console.print(
            f"{plan.batches:,} steps x {plan.images_per_batch:,} images x {trained} captions, and "
            f"{len(plan.validations)} validations x {plan.val_images:,} images x {validated}: "
            f"{forecast.rollouts:,} rollouts to judge"
        )
        console.print(self._table())
        for line in self._sums():
            console.print(line)
        console.print("\nAssumed:")
        for note in self.notes:
            console.print(f"  - {note.text}" + (f"  [{note.change}]" if note.change else ""), markup=False)

    def _table(self) -> Table:
        table = Table(
            "task", "judge", title="What this run's judge will be asked (estimate, nothing was paid)"
        )
        for name in ("calls", "tokens in", "tokens out", "$"):
            table.add_column(name, justify="right")
        used = self.forecast.used
        for key in sorted(used, key=_order):
            table.add_row(*key, *_figures(used[key]), _dollars(self._usd(key, used[key])))
        table.add_section()
        table.add_row("total", "", *_figures(used.all), _dollars(self.usd(used)), style="bold")
        return table

    def _sums(self) -> list[str]:
        forecast, (grouping, other) = self.forecast, self.other
        usd, other_usd = self.usd(forecast.used), self.usd(other.used)
        val = _dollars(self.usd(forecast.val))
        lines = [f"Of this, validation: {forecast.val.all.calls:,.0f} calls, {val}"]
        if usd is not None and forecast.rollouts:
            lines.append(f"$ per 1,000 rollouts: {_dollars(1000 * usd / forecast.rollouts)}")
        lines.append(
            f"With model.judge.grouping={grouping}: {other.used.all.calls:,.0f} calls, "
            f"{_tokens(other.used.all)} tokens, {_dollars(other_usd)}"
        )
        if self.unpriced:
            lines += [
                f"The price of {model} is unknown: set it, per million tokens, with "
                f"--model.judge.prices '{{{model}: {{input: ..., output: ...}}}}'"
                for model in self.unpriced
            ]
        elif self.budget_usd is not None:
            step = self._budget_step()
            budget = f"model.judge.budget_usd={self.budget_usd:g}"
            lines.append(
                f"{budget} lasts for the whole run"
                if step is None
                else f"{budget} is spent at step {step:,} of {forecast.plan.batches:,}: the run would end there"
            )
        return lines


def _plain(usage: Usage) -> dict[str, float]:
    return {
        "calls": round(usage.calls, 1),
        "items": round(usage.items, 1),
        "tokens_in": round(usage.tokens_in),
        "tokens_out": round(usage.tokens_out),
    }


def _order(key: Key) -> tuple[int, Key]:
    order = ("decompose", "verify", "match", "rate")
    return (order.index(key[0]) if key[0] in order else len(order), key)


def _figures(usage: Usage) -> tuple[str, str, str]:
    return f"{usage.calls:,.0f}", f"{usage.tokens_in:,.0f}", f"{usage.tokens_out:,.0f}"


def _tokens(usage: Usage) -> str:
    return f"{usage.tokens_in + usage.tokens_out:,.0f}"


def _dollars(usd: float | None) -> str:
    if usd is None:
        return "unknown"
    return f"${usd:,.2f}" if usd >= 1 or usd == 0 else f"${usd:.4f}"
