"""How the next token is chosen: what a user asks for.

choose.py does it, for many rows at a time.
"""

import dataclasses
import math

from hsai.errors import InputError

LOWEST_TEMPERATURE = 1e-4
"""Below it, logits that are divided by it leave float32; and a draw has long been the likeliest token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen; what is said applies in the order of the fields."""

    repetition_penalty: float = 1.0
    """Divides a positive logit, and multiplies a negative one, of every token that the prompt or the text already has
    (1909.05858); 1 does nothing."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""

    top_k: int | None = None
    """Keeps this many of the likeliest tokens, and equals of the last; none keeps all."""

    top_p: float | None = None
    """Keeps the likeliest tokens until their probabilities reach this sum (1904.09751), and equals of the last; none
    keeps all."""

    min_p: float | None = None
    """Keeps tokens of at least this fraction of the likeliest one's probability (2407.01082); none keeps all."""

    seed: int = 0
    """Of the draws; has no say at temperature 0."""

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 does nothing")
        if self.temperature != 0 and not (LOWEST_TEMPERATURE <= self.temperature < math.inf):
            raise InputError(f"temperature={self.temperature} must be 0 (greedy), or at least {LOWEST_TEMPERATURE}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must be between 0 and {2**32 - 1}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} must be at least 1, or none")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1, or none")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p={self.min_p} must be between 0 and 1, or none")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise InputError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0 (greedy); set a temperature above 0"
                )
