"""Compiles a platform's kernels, in the process that has its compiler on the path: rows of JSON."""

import argparse
import json
import os

import jax

from hsai_kernels.aot.runner import TARGETS, compile_cases


def main() -> None:
    """Prints one row of JSON a line."""
    parser = argparse.ArgumentParser(prog="python -m hsai_kernels.aot", description=__doc__)
    platforms = parser.add_subparsers(dest="platform", required=True)
    for target in TARGETS.values():
        platform = platforms.add_parser(target.platform)
        platform.add_argument("--chips", nargs="+", choices=target.chips, default=target.chips)
        platform.add_argument("--kernels", nargs="+", choices=target.kernels, default=target.kernels)
        platform.add_argument("--quick", action="store_true", help="the small cases only")
        platform.add_argument("--missing", action="store_true", help="only those that the stored table has no row of")
    arguments = parser.parse_args()
    target = TARGETS[arguments.platform]
    # For whoever did not start this by runner.run_apart: the compilers read it when they are loaded, jax has done so.
    os.environ.update(target.environment)
    jax.config.update("jax_platforms", target.environment["JAX_PLATFORMS"])
    wanted = {"quick": arguments.quick, "missing": arguments.missing}
    for row in compile_cases(target, arguments.chips, arguments.kernels, **wanted):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
