"""How to generate: the settings, and which of them go together."""

import dataclasses
from typing import Any

METHODS = ("greedy", "beam", "sample")
_MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How to generate.

    Attributes:
      method: "greedy", "beam" (T5X's beam search) or "sample" (T5X's temperature sampling).
      num_decodes: answers per prompt: samples, or the best of the beams; 1 when greedy.
      max_decode_length: tokens to generate at most.
      stop_when_filled: end an answer with the sentinel that completes its last blank instead of
        eos. Filled texts are the same. Several answers to a prompt, which are ranked by all that is
        generated, go on to eos in any case, and so does a model with a capacity factor, where rows
        that end early would leave room to others.
      beam_size: beams of "beam".
      alpha: strength of the brevity penalty of "beam".
      temperature: of "sample"; 0 is greedy.
      top_k: of "sample": choose among this many tokens; 0 is all.
      top_p: of "sample": choose among the most probable tokens that hold this probability; 0 is
        all.
      seed: of "sample"; equal seeds, prompts and batch sizes give equal answers.
      batch_size: prompts at a time.
      max_input_length: longest prompt, in tokens with its eos. Relative positions set no limit of
        their own, but attention takes memory that grows with the square of the length.

    Raises:
      ValueError: a setting that is out of its range, or does not go with the method.
    """

    method: str = "greedy"
    num_decodes: int = 1
    max_decode_length: int = 32
    beam_size: int = 4
    alpha: float | int = 0.6
    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 0.0
    seed: int = 0
    batch_size: int = 8
    max_input_length: int = 512
    stop_when_filled: bool = True

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; give one of {', '.join(METHODS)}")
        for name in ("num_decodes", "max_decode_length", "beam_size", "batch_size"):
            _require_integer(name, getattr(self, name), 1)
        _require_integer("max_input_length", self.max_input_length, 1)
        _require_integer("top_k", self.top_k, 0)
        _require_integer("seed", self.seed, 0)
        _require_number("alpha", self.alpha, 0.0)
        _require_number("temperature", self.temperature, 0.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        if self.method == "greedy" and self.num_decodes > 1:
            raise ValueError(
                f"num_decodes is {self.num_decodes}, but greedy generation has one answer; give "
                "method 'sample' or 'beam'"
            )
        if self.method == "beam" and self.num_decodes > self.beam_size:
            raise ValueError(
                f"num_decodes is {self.num_decodes}, but beam_size {self.beam_size}: beam search "
                "has as many answers as beams; raise beam_size"
            )

    def check_streamable(self) -> None:
        """Refuse settings that cannot be streamed.

        Raises:
          ValueError: beam search, which knows its answer at the end, or several decodes.
        """
        if self.method == "beam":
            raise ValueError(
                "beam search knows its answer only at the end and cannot be streamed; use method "
                "'greedy' or 'sample'"
            )
        if self.num_decodes > 1:
            raise ValueError(
                f"num_decodes is {self.num_decodes}, but one answer at a time can be streamed; "
                "give num_decodes 1"
            )

    def sampling(self) -> dict[str, Any]:
        """Return what `sampling.sample_token` is told; "greedy" is temperature 0."""
        if self.method == "greedy":
            return {"temperature": 0.0}
        return {
            "temperature": float(self.temperature),
            "top_k": self.top_k,
            "top_p": float(self.top_p),
        }


def _require_integer(name: str, value: Any, minimum: int) -> None:
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not (integer and minimum <= value <= _MOST):
        raise ValueError(f"{name} is {value!r}; give an integer from {minimum} to {_MOST}")


def _require_number(name: str, value: Any, minimum: float, most: float = float("inf")) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and minimum <= value <= most and value < float("inf")):
        unbounded = most == float("inf")
        bounds = f"of at least {minimum:g}" if unbounded else f"in [{minimum:g}, {most:g}]"
        raise ValueError(f"{name} is {value!r}; give a number {bounds}")
