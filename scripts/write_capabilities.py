"""Compiles every kernel of a platform for its chips, none of them here, and stores what the compiler said.

    bash scripts/install_aot.sh .venv/bin/python && python scripts/write_capabilities.py tpu

Writes kernels/hsai_kernels/capabilities/PLATFORM.json, and docs/kernels.md from all such files; without a platform only
docs/kernels.md. Minutes on one core.
"""

import importlib
import importlib.metadata
import sys
from pathlib import Path

from hsai_kernels.capabilities import list_platforms, read_compiler, render_markdown, write_capabilities

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Kernels: what compiles for which chip

Written by `python scripts/write_capabilities.py`, from `kernels/hsai_kernels/capabilities/*.json`; not by hand.
Each row is a program that the platform's own compiler was given, with no chip present; it says nothing of time or
numbers.
"""


def compile_platform(platform: str) -> None:
    """Renews the file of a platform, by its module hsai_kernels.aot_PLATFORM and the compiler in .aot/PLATFORM."""
    folder = ROOT / ".aot" / platform
    if not folder.is_dir():
        sys.exit(f"{folder} is not there: bash scripts/install_aot.sh {sys.executable}")
    compiler = (folder / ".installed").read_text().strip()
    rows = importlib.import_module(f"hsai_kernels.aot_{platform}").compile_kernels(folder)
    path = write_capabilities(platform, f"jax {importlib.metadata.version('jax')}, {compiler}", rows)
    refused = sum(row["outcome"] != "compiles" for row in rows)
    print(f"{path}: {len(rows)} programs, {refused} that do not simply compile")


def main() -> None:
    """Renews the files that are asked for, and the page."""
    for platform in sys.argv[1:]:
        compile_platform(platform)
    parts = [f"\n## {name}\n\n{read_compiler(name)}.\n\n{render_markdown(name)}" for name in list_platforms()]
    (ROOT / "docs" / "kernels.md").write_text(HEAD + "".join(parts))


if __name__ == "__main__":
    main()
