"""What `qmoe_jax.infer` prints and writes of its answers, its speed and its memory."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from qmoe_jax.generation.text import Filled, fill_blanks
from qmoe_jax.pipeline.run_log import peak_host_bytes

_BRIGHT, _PLAIN = "\x1b[1;32m", "\x1b[0m"


def to_line(answers: Sequence[Filled]) -> dict[str, Any]:
    """Return a prompt's line of the output."""
    return {
        "inputs": answers[0].prompt,
        "decodes": [
            {
                "prediction": answer.generated,
                "text": answer.text,
                "score": None if answer.score != answer.score else answer.score,
                "tokens": list(answer.tokens),
            }
            for answer in answers
        ],
    }


def from_line(line: dict[str, Any]) -> list[Filled]:
    """Return the answers of a line of the output."""
    return [
        Filled(
            line["inputs"],
            decode["prediction"],
            decode["text"],
            tuple(decode["tokens"]),
            float("nan") if decode["score"] is None else decode["score"],
        )
        for decode in line["decodes"]
    ]


def print_answers(answers: Sequence[Filled], *, scores: bool = False) -> None:
    """Return a prompt and its answers, the best first, with or without their scores."""
    print(answers[0].prompt)
    for answer in answers:
        score = f"[{answer.score:.3f}] " if scores else ""
        print(f"  -> {score}{answer.generated}\n  => {marked(answer)}")


def marked(answer: Filled) -> str:
    """Fill the prompt; on a terminal its spans stand out, by colour or (NO_COLOR) by brackets."""
    if not sys.stdout.isatty():
        return answer.text
    before, after = ("[", "]") if os.environ.get("NO_COLOR") else (_BRIGHT, _PLAIN)
    return fill_blanks(answer.prompt, answer.generated, before=before, after=after)


class Speed:
    """Tokens and seconds, those of batches that may include compilation apart."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0
        self._warm_tokens, self._warm_seconds = 0, 0.0

    def add(self, tokens: int, seconds: float, compiled: bool) -> None:
        """Count a batch; `compiled` if its seconds may include compilation."""
        self._tokens += tokens
        self._seconds += seconds
        if not compiled:
            self._warm_tokens += tokens
            self._warm_seconds += seconds

    def summary(self) -> str:
        """Speed and memory in one line."""
        if not self._tokens:
            return f"nothing was left to generate; {memory()}"
        rate = self._tokens / self._seconds
        line = (
            f"{self._tokens} tokens in {self._seconds:.1f} s with compilation, {rate:.1f} tokens/s"
        )
        if self._warm_tokens:
            line += f" ({self._warm_tokens / self._warm_seconds:.1f} without)"
        return f"{line}; {memory()}"


def memory() -> str:
    """Peak memory of the process, and of devices that count theirs."""
    parts = [f"peak memory {peak_host_bytes() / 2**20:,.0f} MiB on the host"]
    for device in jax.local_devices():
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if peak is not None:
            parts.append(f"{peak / 2**20:,.0f} MiB on {device.device_kind} {device.id}")
    return ", ".join(parts)
