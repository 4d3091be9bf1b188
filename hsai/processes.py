"""Several processes of one run that fail together: what one of them cannot do, all of them refuse.

A process that raises alone leaves the others waiting at their next collective operation, for minutes or for ever. So
whatever may fail on one process only (a file that is locked, missing or different there) is done through here.
"""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from hsai.errors import InputError

T = TypeVar("T")

# Every process sends as many bytes, whether it failed or not: a kind, and the beginning of a message.
_MESSAGE_BYTES = 1024
_INPUT, _DEFECT = b"I", b"D"


def agree(work: Callable[[], T]) -> T:
    """What `work` returns on this process, once it has returned on all of them; every process must call this.

    Raises:
      InputError: `work` raised one on some process; the message names the first such process, unless it is this one.
      RuntimeError: `work` raised anything else on another process. On the one where it did, that error itself.
    """
    if jax.process_count() == 1:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # raised again below, after the others have heard of it
        failure = error
    kind = b"" if failure is None else _INPUT if isinstance(failure, InputError) else _DEFECT
    texts = _gather(kind if failure is None else kind + str(failure).encode(errors="replace"))
    if failure is not None:
        raise failure
    for process, text in enumerate(texts):
        if text:
            raised = InputError if text[:1] == _INPUT else RuntimeError
            raise raised(f"process {process}: {text[1:].decode(errors='ignore')}")
    return result


def require_same(name: str, value: str) -> None:
    """Raises `InputError` on every process unless `value`, such as the config of the run, is the same on all."""
    if jax.process_count() == 1:
        return
    digests = _gather(hashlib.sha256(value.encode()).digest())
    for process, digest in enumerate(digests):
        if digest != digests[0]:
            raise InputError(f"process {process} has another {name} than process 0; all processes need the same")


def _gather(text: bytes) -> list[bytes]:
    """The `text` of every process, in their order, cut to `_MESSAGE_BYTES`; without zero bytes at its end."""
    buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
    cut = text[:_MESSAGE_BYTES]
    buffer[: len(cut)] = np.frombuffer(cut, np.uint8)
    return [bytes(row).rstrip(b"\0") for row in np.asarray(multihost_utils.process_allgather(buffer))]
