"""Compiles every kernel of a platform for its chips, none of them here, and stores what the compiler said.

    bash scripts/install_aot.sh .venv/bin/python && python scripts/write_capabilities.py tpu [--missing] [KERNEL ...]

Writes kernels/hsai_kernels/capabilities/PLATFORM.json, and docs/kernels.md from all such files and from what the
kernels say that they do not serve; without a platform only docs/kernels.md. With kernels, only their rows are renewed,
and with --missing only cases compiled that have no row yet: by the same compiler as the others. Minutes on one core.
"""

import argparse
import sys
from pathlib import Path

from hsai_kernels.aot.pins import describe_compiler, list_pins
from hsai_kernels.aot.runner import TARGETS, compile_kernels
from hsai_kernels.capabilities import (
    Row,
    identify,
    list_platforms,
    read_capabilities,
    read_compiler,
    render_markdown,
    write_capabilities,
)
from hsai_kernels.capabilities.served import render_served

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
HEAD = """# Kernels: what there is, and what compiles for which chip

Written by `python scripts/write_capabilities.py`, from `kernels/hsai_kernels/capabilities/*.json` and from what the
kernels say of calls that they do not serve; not by hand.

## Which calls have a kernel

"kernel" is one of the platform's own; everything else is plain jax there. The unstructured formats have no kernel on
any platform: their dense weight is rebuilt for each product. Accelerators copy pages side by side, and widen caches of
4 bits, in front of their kernel. Which formats a CPU multiplies by is in docs/compression.md.

"""
CHIPS = """
Each row of the tables below is a program that the platform's own compiler was given, with no chip present; it says
nothing of time or numbers.
"""


def explain_stale(platform: str) -> str | None:
    """Why the stored rows of a platform have to be compiled anew, and how; None if its pinned compilers made them."""
    stored, pinned = read_compiler(platform), describe_compiler(platform)
    if stored == pinned:
        return None
    return f"the rows are of {stored}, pinned are {pinned}: run scripts/write_capabilities.py {platform}"


def compile_platform(platform: str, kernels: list[str], *, missing: bool) -> None:
    """Renews the file of a platform, by the compiler in .aot/PLATFORM."""
    target, folder = TARGETS[platform], ROOT / ".aot" / platform
    installed = folder / ".installed"
    if not installed.exists() or installed.read_text().split()[1:] != list_pins(platform):
        sys.exit(f"{folder} has not the compiler: bash scripts/install_aot.sh {sys.executable}")
    rows: dict[tuple[str, ...], Row] = {}
    if kernels or missing:
        stale = explain_stale(platform)
        if stale is not None:
            sys.exit(stale)
        rows = {identify(row): row for row in read_capabilities(platform)}
    compiled = compile_kernels(platform, folder, kernels=kernels or None, missing=missing)
    rows |= {identify(row): row for row in compiled}
    # In the order of the lists, without what they no longer have.
    cases = [(case.kernel, case.name, case.dtype) for case in target.list_cases(target.kernels, quick=False)]
    ordered = [rows[*case, chip] for chip in target.chips for case in cases if (*case, chip) in rows]
    path = write_capabilities(platform, describe_compiler(platform), ordered)
    refused = sum(row["outcome"] != "compiles" for row in ordered)
    print(f"{path}: {len(ordered)} programs, {len(compiled)} compiled now; {refused} do not simply compile")


def render_page() -> str:
    """docs/kernels.md, from the kernels' own words and the stored tables."""
    parts = [f"\n## {name}\n\n{read_compiler(name)}.\n\n{render_markdown(name)}" for name in list_platforms()]
    return HEAD + render_served() + CHIPS + "".join(parts)


def main() -> None:
    """Renews the file that is asked for, and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    platforms = parser.add_subparsers(dest="platform")
    for target in TARGETS.values():
        platform = platforms.add_parser(target.platform)
        platform.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(target.kernels)}")
        platform.add_argument("--missing", action="store_true", help="compile only cases that have no row yet")
    arguments = parser.parse_args()
    if arguments.platform is not None:
        unknown = set(arguments.kernels) - set(TARGETS[arguments.platform].kernels)
        if unknown:
            parser.error(f"{arguments.platform} has no kernels {', '.join(sorted(unknown))}")
        compile_platform(arguments.platform, arguments.kernels, missing=arguments.missing)
    PAGE.write_text(render_page())


if __name__ == "__main__":
    main()
