"""Numbers and tables as text: one way to print each, for every command and report."""

from collections.abc import Sequence
from typing import Literal


def format_bytes(num_bytes: int) -> str:
    """Return `1.46 GB`: a size with four digits, in powers of ten up to TB."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.4g} {unit}"


def format_memory(num_bytes: int, unit: Literal["MiB", "GiB"] = "MiB") -> str:
    """Return `1,745 MiB` or `1.70 GiB`: memory in powers of two, as its makers count it."""
    if unit == "MiB":
        return f"{num_bytes / 2**20:,.0f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """Return `3.2 min`: a duration in the largest of s, min, h and d of which it has two."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def format_row(
    cells: Sequence[str], widths: Sequence[int], *, separator: str = "  ", num_left: int = 1
) -> str:
    """Return one line of a table whose widths are known before its rows are.

    Args:
      cells: one for each column.
      widths: characters of each column; a longer cell takes what it needs.
      separator: between columns.
      num_left: so many columns from the left are aligned left, the others right.
    """
    return separator.join(
        cell.ljust(width) if column < num_left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def format_table(
    rows: Sequence[Sequence[str]],
    *,
    min_widths: Sequence[int] | None = None,
    separator: str = "  ",
    num_left: int = 1,
    rule: Literal["columns", "line"] = "columns",
) -> str:
    """Return a table as text, every column as wide as its longest cell.

    Args:
      rows: the headings, then the rows, a cell for each column.
      min_widths: least characters of each column; 0 where None.
      separator: between columns.
      num_left: so many columns from the left are aligned left, the others right.
      rule: dashes below the headings: "columns" below each, "line" from end to end.
    """
    least = min_widths or [0] * len(rows[0])
    widths = [
        max(width, *map(len, column))
        for width, column in zip(least, zip(*rows, strict=True), strict=True)
    ]
    lines = [format_row(row, widths, separator=separator, num_left=num_left) for row in rows]
    dashes = ["-" * width for width in widths]
    lines.insert(1, separator.join(dashes) if rule == "columns" else "-" * len(lines[0]))
    return "\n".join(lines)
