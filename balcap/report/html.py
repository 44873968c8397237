"""Pages of one file each, from `templates/`: texts escaped and made visible, charts drawn by the page itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from balcap.report.figures import Figure
from balcap.report.text import text_filter

TEMPLATES = Path(__file__).parent / "templates"


class Charts:
    """The charts of a page, each under a name that the page looks it up by."""

    def __init__(self) -> None:
        self.drawn: dict[str, Figure] = {}

    def add(self, figure: Figure) -> dict[str, Any]:
        """What a template's ``chart`` wants of it."""
        key = f"f{len(self.drawn)}"
        self.drawn[key] = figure
        return {"id": key, "title": figure["title"], "note": figure.get("note")}


def rendered(template: str, content: Mapping[str, Any], charts: Charts) -> str:
    """The HTML text of a page.

    Args:
        template: a file of `TEMPLATES`, which extends ``base.html.jinja``.
        content: what it shows.
        charts: that `content` names.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from balcap import __version__

    visible = text_filter()

    def finalize(value: Any) -> Any:
        return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=finalize,
    )
    assets = {name: Markup((TEMPLATES / f"report.{name}").read_text()) for name in ("css", "js")}
    drawn = {
        key: _texts({"data": f["data"], "layout": f["layout"]}, visible) for key, f in charts.drawn.items()
    }
    return environment.get_template(template).render(
        **content,
        **assets,
        figures=drawn,
        plotly=Markup(get_plotlyjs()),
        version=__version__,
        date=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def _texts(value: Any, visible: Callable[[str], str]) -> Any:
    """A figure whose texts are as the page may show them."""
    if isinstance(value, Mapping):
        return {key: _texts(inner, visible) for key, inner in value.items()}
    if isinstance(value, list):
        return [_texts(inner, visible) for inner in value]
    return visible(value) if isinstance(value, str) else value
