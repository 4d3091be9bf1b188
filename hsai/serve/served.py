"""What a server serves, and within which limits."""

import dataclasses

from hsai.infer import Engine
from hsai.infer.defaults import GenerationDefaults
from hsai.infer.service import Service


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may take."""

    body_bytes: int = 1 << 20
    """Of its body; a prompt of 128k tokens has about half of that."""

    body_seconds: float = 60.0
    """Until its body is there."""

    seconds: float = 600.0
    """From its head to the end of its answer, the time in the queue included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """One model."""

    name: str
    """By which requests ask for it."""

    engine: Engine
    """Which makes prompts tokens."""

    service: Service
    """Which answers."""

    defaults: GenerationDefaults
    """How its makers draw from it."""

    created: int
    """Seconds since 1970 at which serving began."""
