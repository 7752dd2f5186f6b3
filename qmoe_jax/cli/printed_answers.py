"""How `infer` prints and writes answers, and what it says of speed and memory."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from qmoe_jax.formatting import format_memory
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


def print_answers(
    answers: Sequence[Filled], *, scores: bool = False, with_prompt: bool = True
) -> None:
    """Print a prompt and its answers, the best first, with or without their scores."""
    if with_prompt:
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
    """Tokens and seconds; those of compilation apart."""

    def __init__(self) -> None:
        self._tokens, self._seconds, self._compile_seconds = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float, compile_seconds: float) -> None:
        """Count a batch; `seconds` are without compilation."""
        self._tokens += tokens
        self._seconds += seconds
        self._compile_seconds += compile_seconds

    def summary(self) -> str:
        """Speed and memory in one line."""
        if not self._tokens:
            return f"nothing was left to generate; {memory()}"
        line = f"{self._tokens} tokens in {self._seconds:.1f} s, "
        line += f"{self._tokens / max(self._seconds, 1e-9):.1f} tokens/s"
        if self._compile_seconds >= 0.05:
            line += f", besides {self._compile_seconds:.1f} s of compilation"
        return f"{line}; {memory()}"


def memory() -> str:
    """Peak memory of the process, and of devices that count theirs."""
    parts = [f"peak memory {format_memory(peak_host_bytes())} on the host"]
    for device in jax.local_devices():
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if peak is not None:
            parts.append(f"{format_memory(peak)} on {device.device_kind} {device.id}")
    return ", ".join(parts)
