"""What mkdocs does not do by itself: pages and pictures from outside docs/, and links to the repository's files.

Links in the Markdown files are relative paths, as GitHub follows them. Here those to README.md and CONTRIBUTING.md lead
to their pages, and those to code to the repository (`repo_url` in mkdocs.yml); while that is not set, they become the
file's path. A link to a file that does not exist is a warning, which ends a strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
import textwrap
from functools import partial
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository -> their names on the site, where a ``README.md`` would be the home page."""
PICTURES = [f"assets/{path.name}" for path in (ROOT / "assets").glob("*.png")]

_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_IN_LIST = re.compile(r"^  (?=\S)", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what stands outside docs/."""
    for source, name in {**PAGES, **{picture: picture for picture in PICTURES}}.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page; code stays as it is."""
    sources = {name: source for source, name in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    link = partial(_link, source=source, page=page.file.src_uri, repo_url=config.repo_url)
    parts = _FENCED.split(markdown)
    parts[::2] = [_IN_LIST.sub("    ", _LINK.sub(link, text)) for text in parts[::2]]
    # Within lists GitHub indents by two spaces, mkdocs by four.
    parts[1::2] = [textwrap.indent(code, "  ") if code.startswith("  ") else code for code in parts[1::2]]
    return "".join(parts)


def _link(match: re.Match[str], source: str, page: str, repo_url: str | None) -> str:
    """A link as the site has it.

    Args:
        match: of `_LINK`.
        source: path in the repository of the file that it stands in.
        page: that file's path on the site.
        repo_url: address of the repository, None where there is none.
    """
    picture, text, path, anchor = match.group(1), match.group(2), match.group(3), match.group(4) or ""
    if re.match(r"[a-z]+:", path):
        return match.group()
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if target in PAGES or target in PICTURES or target.startswith("docs/"):
        on_site = PAGES.get(target, target.removeprefix("docs/"))
        return f"{picture}[{text}]({posixpath.relpath(on_site, posixpath.dirname(page) or '.')}{anchor})"
    if picture or not (ROOT / target).exists():
        _log.warning(f"{source} has a link to {target}, which does not exist or is no picture of assets/")
    if repo_url:
        return f"[{text}]({repo_url.rstrip('/')}/blob/main/{target}{anchor})"
    name = text.strip("`").rstrip("/")
    return f"`{target}`" if target.endswith(name) else f"{text} (`{target}`)"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings introduce a block of code with ``::``, as reStructuredText does."""
    return html.replace("::</p>", ":</p>")
