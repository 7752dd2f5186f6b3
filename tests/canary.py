"""A folder tree as it is, to be compared before and after."""

import os
from pathlib import Path


def tree(folder):
    """Every path below a folder with what it holds; links as links."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        content = os.readlink(path) if path.is_symlink() else None
        if content is None and path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = content
    return found
