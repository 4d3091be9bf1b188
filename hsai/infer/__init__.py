"""Runs a bundle on one device: `Engine.load(directory).generate("def main(")`.

A request (`request.py`) goes to a service (`service.py`), whose one thread turns the scheduler (`scheduler.py`):
prompts are read in chunks, and rows (`row.py`) write tokens in blocks, into pages that are found again (`pages.py`).
That runs on the device as programs (`programs.py`, `choose.py`) that are traced here (`runtime.py`), or shipped in the
bundle (`graphs.py`); tokens may be drafted first (`speculation.py`, `speculator.py`). `streaming.py` makes tokens text,
`constraint.py` says which may come next. The engine (`engine.py`) is for one text at a time.
"""

from hsai.infer.engine import Engine, Generation
from hsai.infer.request import Event, JsonSchema, Regex, Request
from hsai.infer.sampling import SamplingConfig
from hsai.infer.service import Busy, Closed, Service, Ticket
from hsai.infer.speculator import Drafting

__all__ = [
    "Busy",
    "Closed",
    "Drafting",
    "Engine",
    "Event",
    "Generation",
    "JsonSchema",
    "Regex",
    "Request",
    "SamplingConfig",
    "Service",
    "Ticket",
]
