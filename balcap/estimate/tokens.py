"""Tokens of texts and of reasoning, without asking anybody."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from balcap.judge.client import import_litellm

TextTokens = Callable[[str], int]

_REASONS = r"gpt-5(-mini|-nano|-20\d\d|$)|\bo[134](-|$)|gemini-(2\.5|[3-9])|deepseek-r|qwq"
"""Models that reason unless they are told not to; GPT-5.1 and later, Claude and most open ones do not."""

# Output tokens per call that are billed and never seen. Short questions with a list to fill in.
EFFORTS = {"none": 0, "disable": 0, "minimal": 0, "low": 200, "medium": 800, "high": 2500, "xhigh": 5000}


def text_counter(chars_per_token: float | None) -> tuple[TextTokens, str]:
    """Counts the tokens of a text; and what it is, for a person.

    Args:
        chars_per_token: characters that make a token; None takes litellm's tokenizer, which needs no network.
    """
    if chars_per_token is not None:
        return lambda text: int(len(text) / chars_per_token), f"{chars_per_token:g} characters a token"
    count = import_litellm().token_counter
    # The model only chooses a tokenizer: this one lies in litellm, others would be fetched.
    return (
        functools.lru_cache(maxsize=4096)(lambda text: count(model="gpt-4o", text=text)),
        "OpenAI's cl100k_base tokenizer, within some percent of others",
    )


def reasoning_tokens(model: str, params: Mapping[str, Any]) -> int:
    """Assumed output tokens per call that a model spends on reasoning, beside its answer.

    From ``reasoning_effort`` (or the budget of Anthropic's ``thinking``), else from what the model does by
    itself.
    """
    effort = params.get("reasoning_effort")
    effort = effort.get("effort") if isinstance(effort, Mapping) else effort
    if effort is not None:
        return EFFORTS.get(str(effort), EFFORTS["medium"])
    thinking = params.get("thinking")
    if isinstance(thinking, Mapping) and thinking.get("type") != "disabled":
        return min(EFFORTS["medium"], int(thinking.get("budget_tokens") or EFFORTS["medium"]))
    return EFFORTS["medium"] if re.search(_REASONS, model) else 0
