"""Compiled programs on disk, so that a second start does not compile again: XLA's own cache, local and bounded."""

import hashlib
import logging
import platform
from pathlib import Path

import jax

from hsai.fetch.cache import default_cache

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 30
"""Of all programs of a folder; those that were not used for longest go first."""


def keep_programs(directory: Path | None = None) -> None:
    """From now on, this process keeps compiled programs in `directory`, by default `programs` in hsai's cache.

    Each kind of processor has its own folder there: a home may be shared by several. What another jax compiled, or
    other options, is told apart by jax. Programs are machine code: nobody else must be able to write there.
    """
    directory = (default_cache() / "programs" if directory is None else directory) / name_processor()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("programs are compiled at every start: %s: %s", directory, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    # All of them: many small programs take as long as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def name_processor() -> str:
    """A name that processors share if they run each other's programs: by architecture, and what it has beside that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    digest = hashlib.sha256("\n".join([*features, platform.processor()]).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"
