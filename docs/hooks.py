"""What mkdocs does beside its configuration: the pages of the repository's root, and what the search leaves out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are beside the folder docs/, with their links as they are from within it."""
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for other in PAGES:
            text = text.replace(f"]({other}", f"]({other.lower()}")
        text = re.sub(r"\]\(docs/", "](", text)
        files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the pages of the root to those that were added; keep the tables of results out of the search."""
    for name in PAGES:
        markdown = markdown.replace(f"](../{name}", f"]({name.lower()}")
    if page.file.src_uri == "results.md":
        page.meta["search"] = {"exclude": True}
    return markdown
