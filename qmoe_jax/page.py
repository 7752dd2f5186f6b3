"""Reports as one HTML file that needs nothing else: its head, its tables, its foot."""

import datetime
import html
from collections.abc import Sequence
from pathlib import Path

import qmoe_jax

_GENERATOR = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="generator" '
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .5rem; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
tr { border-bottom: 1px solid #ddd }
div.wide { overflow-x: auto; margin: 1rem 0 } svg { max-width: 100%; height: auto }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; white-space: pre-wrap }
.warning { color: #a33 } footer { margin-top: 3rem; color: #777; font-size: .85rem }
"""


def head(kind: str) -> str:
    """How a page of a kind begins; by it a later run knows that it may replace the file."""
    return f'{_GENERATOR}content="qmoe_jax {html.escape(kind)}">'


def is_page(file: Path, kind: str) -> bool:
    """Whether a file is a page of a kind that this package wrote."""
    start = head(kind).encode()
    try:
        with open(file, "rb") as content:
            return content.read(len(start)) == start
    except OSError:
        return False


def page(
    kind: str, title: str, parts: Sequence[str], *, now: datetime.datetime | None = None
) -> str:
    """Return a page.

    Args:
      kind: of report, see `is_page`.
      title: of the page, text.
      parts: HTML, one after the other.
      now: when it was made; the present where None.
    """
    made = (now or datetime.datetime.now(datetime.UTC)).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join(
        [
            head(kind),
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(title)}</title><style>{_CSS}</style>",
            f"<h1>{html.escape(title)}</h1>",
            *parts,
            f"<footer>qmoe-jax {qmoe_jax.__version__}, {made}</footer></html>",
            "",
        ]
    )


def warning(text: str) -> str:
    """Return a warning as a paragraph that stands out."""
    return f'<p class="warning">Warning: {html.escape(text)}</p>'


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts, the first row its headings."""
    headings, *body = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in headings) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return the same in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
