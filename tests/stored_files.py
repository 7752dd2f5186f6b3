"""Where the bytes of an array of a compressed checkpoint lie, for tests that damage them."""

import json
import math
from collections.abc import Callable
from pathlib import Path

ITEM_BYTES = {"uint8": 1, "uint16": 2, "bfloat16": 2, "int32": 4, "uint32": 4, "float32": 4}


def change_coded(folder: Path, kernel: str, array: str, to: Callable[[bytes], bytes]) -> None:
    """Replace the stored bytes of an array of a coded kernel, which is not split into chunks."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["coded"][kernel]["arrays"][array]
    (chunk,) = (f for f in (folder / entry["file"]).iterdir() if not f.name.startswith("."))
    content, start = chunk.read_bytes(), entry.get("start", 0)
    stop = start + ITEM_BYTES[entry["dtype"]] * math.prod(entry["shape"])
    chunk.write_bytes(content[:start] + to(content[start:stop]) + content[stop:])


def flipped(content: bytes) -> bytes:
    """Flip a bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
