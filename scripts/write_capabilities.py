"""Compiles every kernel of a platform for its chips, none of them here, and stores what the compiler said.

    bash scripts/install_aot.sh .venv/bin/python && python scripts/write_capabilities.py tpu [KERNEL ...]

Writes kernels/hsai_kernels/capabilities/PLATFORM.json, and docs/kernels.md from all such files; without a platform only
docs/kernels.md. With kernels, only their rows are renewed, by the same compiler as the others. Minutes on one core.
"""

import importlib.metadata
import sys
from pathlib import Path

from hsai_kernels.aot.runner import TARGETS, compile_kernels
from hsai_kernels.capabilities import (
    list_platforms,
    read_capabilities,
    read_compiler,
    render_markdown,
    write_capabilities,
)

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
HEAD = """# Kernels: what compiles for which chip

Written by `python scripts/write_capabilities.py`, from `kernels/hsai_kernels/capabilities/*.json`; not by hand.
Each row is a program that the platform's own compiler was given, with no chip present; it says nothing of time or
numbers.
"""


def compile_platform(platform: str, kernels: list[str]) -> None:
    """Renews the file of a platform, by the compiler in .aot/PLATFORM."""
    folder = ROOT / ".aot" / platform
    if not folder.is_dir():
        sys.exit(f"{folder} is not there: bash scripts/install_aot.sh {sys.executable}")
    compiler = f"jax {importlib.metadata.version('jax')}, {(folder / '.installed').read_text().strip()}"
    kept = []
    if kernels:
        if read_compiler(platform) != compiler:
            sys.exit(f"the other rows are of {read_compiler(platform)}, this is {compiler}: renew all kernels")
        kept = [row for row in read_capabilities(platform) if row["kernel"].split()[0] not in kernels]
    rows = [*kept, *compile_kernels(platform, folder, kernels=kernels or None)]
    path = write_capabilities(platform, compiler, rows)
    refused = sum(row["outcome"] != "compiles" for row in rows)
    print(f"{path}: {len(rows)} programs, {refused} that do not simply compile")


def render_page() -> str:
    """docs/kernels.md, from the stored tables."""
    parts = [f"\n## {name}\n\n{read_compiler(name)}.\n\n{render_markdown(name)}" for name in list_platforms()]
    return HEAD + "".join(parts)


def main() -> None:
    """Renews the file that is asked for, and the page."""
    if len(sys.argv) > 1:
        if sys.argv[1] not in TARGETS:
            sys.exit(f"unknown platform {sys.argv[1]!r}: valid are {', '.join(TARGETS)}")
        compile_platform(sys.argv[1], sys.argv[2:])
    PAGE.write_text(render_page())


if __name__ == "__main__":
    main()
