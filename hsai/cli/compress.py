"""Make weights sparse and low-bit: a model in, a bundle (without graphs) and its ledger out.

hsai compress runs/quickstart --recipe configs/compress/int4.py --out runs/quickstart/int4
Of several recipes each gets a directory of its name under --out. A recipe that calibrates reads training text of the
model's own corpus, or a file: --calibration text.txt; on such a file others are measured, layer by layer. If a recipe
that calibrates is killed, the same command goes on at the layer it was in.
A recipe that leaves a choice of formats spends a budget on it: its own, or --budget 60MB, or --bits-per-weight 2.5; of
several (--bits-per-weight 4.5 3.5 2.5) each has a directory, and what candidates cost is measured once.
With --mesh 1x8x1 the model, the calibration and the solvers' matrices are split over eight devices of this machine; a
CPU is made of eight by JAX_NUM_CPU_DEVICES=8 in front of the command.
"""

import contextlib
import functools
import shlex
import time
from pathlib import Path
from typing import Literal, get_args

import jax

import hsai
from hsai.cli.budgets import SharedTrials, add_budget_arguments, spread_budgets
from hsai.cli.calibrations import check_batches, read_windows
from hsai.cli.meshes import read_mesh
from hsai.cli.parser import Parser
from hsai.cli.places import no_empty_directories
from hsai.cli.targets import check_apart, check_targets, is_kept
from hsai.compress import Plan, RecipeConfig, check_kernels, compress, plan_recipe
from hsai.compress.allocate import Allocation
from hsai.compress.calibration import digest_windows
from hsai.compress.resume import Workbench, check_unfinished
from hsai.config_file import load_config
from hsai.configuration import to_dict
from hsai.errors import InputError
from hsai.export.bundle import write_bundle
from hsai.export.history import pass_on
from hsai.export.source import inspect_model, open_model
from hsai.formats.kernels import Platform
from hsai.machine import describe_machine, digest_sources, read_peak_memory, reset_peak_memory
from hsai.progress import ProgressBar, console, say
from hsai.sharding import check_mesh, tree_shardings, use_mesh
from hsai_kernels.dispatch import find_platform


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument("model", type=Path, help="a run, a bundle, a checkpoint of transformers, or a GGUF file")
    parser.add_argument("--recipe", required=True, nargs="+", help="Python files with get_config() -> RecipeConfig")
    parser.add_argument("--out", required=True, type=Path, help="directory to be made")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text: recipes calibrate on it, or are measured")
    add_budget_arguments(parser)
    parser.add_argument(
        "--target",
        choices=(*get_args(Platform), "none"),
        help="refuse formats that this platform has no kernels for (default: this machine's); none takes them all",
    )
    parser.add_argument("--mesh", help="DATAxFSDPxMODEL, such as 1x8x1 (default: one device); see `hsai train`")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands there, once the new one is whole")
    parser.add_argument(
        "--reuse", action="store_true", help="keep what the same recipe and sources made of the same weights"
    )


def run(parser: Parser, argv: list[str]) -> None:
    """Checks every recipe and directory first, then compresses with one after the other."""
    arguments = parser.parse(argv)
    recipes = {Path(path).stem: load_config(path, RecipeConfig).config for path in arguments.recipe}
    if len(recipes) < len(arguments.recipe):
        raise InputError(f"--recipe {' '.join(arguments.recipe)}: two have one name; give each file a name of its own")
    recipes = spread_budgets(recipes, arguments)
    named = {name: arguments.out / name if len(recipes) > 1 else arguments.out for name in recipes}
    check_apart(named.values(), arguments.model)
    check_targets(named.values(), arguments)
    targets = {name: path.resolve() for name, path in named.items()}  # "." and ".." have no name of their own
    benches = {  # others take seconds, or one pass over the text
        name: targets[name].with_name(f".{targets[name].name}.partial")
        for name, recipe in recipes.items()
        if recipe.calibration is not None
    }
    for bench in benches.values():
        check_unfinished(bench)
    mesh = None if arguments.mesh is None else read_mesh(arguments.mesh)
    if mesh is not None:
        check_mesh(mesh, inspect_model(arguments.model).config.axis_sizes)
        check_batches(recipes, mesh)
    source = open_model(arguments.model, mesh=mesh)
    plans: dict[str, Plan] = {}
    for name, recipe in recipes.items():
        try:
            plans[name] = plan_recipe(recipe, source.model)
        except InputError as error:
            raise InputError(f"recipe {name}: {error}") from error
        check_target(name, plans[name], arguments.target)
    windows = read_windows(recipes, plans, source, arguments.calibration)
    by = {"sources_sha256": digest_sources(), "mesh": arguments.mesh}
    made = {name: {"source_sha256": source.sha256, "recipe": to_dict(recipe)} | by for name, recipe in recipes.items()}
    for name, drawn in windows.items():
        use = "calibration" if plans[name].reads_text else "measured"
        made[name][f"{use}_sha256"] = digest_windows(drawn)
    kept = {name for name, path in named.items() if is_kept(path, made[name], arguments)}
    with no_empty_directories(targets.values()), contextlib.nullcontext() if mesh is None else use_mesh(mesh):
        dense = source.model if mesh is None else jax.device_put(source.model, tree_shardings(source.model, mesh))
        is_first, trials = True, SharedTrials()
        for name, recipe in recipes.items():
            if name in kept:
                say(f"reusing {named[name]}")
                continue
            extra = pass_on(source) | made[name] | {"recipe_name": name}
            machine = describe_machine()  # as it is now: files may change before the last layer
            record = made[name] | {"hsai": hsai.__version__, "commit": machine["commit"]}
            start, own = time.monotonic(), reset_peak_memory()
            opened = contextlib.nullcontext() if name not in benches else Workbench(benches[name], record)
            with opened as workbench:
                if workbench is not None:
                    _tell_workbench(name, benches[name], workbench, source.config.layers)
                    if recipe.allocation is not None and trials.lend(recipe, workbench):
                        say(f"{name}: what its candidates cost was measured for the budget before")
                with ProgressBar() as progress:
                    report = functools.partial(_report, progress, name)
                    model, ledger = compress(
                        dense, recipe, calibration=windows.get(name), workbench=workbench, progress=report
                    )
                command = shlex.join(["hsai", "compress", *argv])
                made_by = {name: value for name, value in machine.items() if name not in ("command", "commit")}
                cost = {
                    "seconds": round(time.monotonic() - start, 1),
                    "resumed": "" if workbench is None else workbench.found,  # whose seconds are not among them
                    "machine": made_by,
                }
                # A peak that could not begin anew may be that of the recipe before.
                peaks = {peak: held for peak, held in read_peak_memory().items() if is_first or peak in own}
                cost |= {f"{peak}_mib": held // 2**20 for peak, held in peaks.items()}
                is_first = False
                extra |= {"ledger": ledger.to_dict(), "cost": cost}
                extra |= {"command": command, "commit": machine["commit"]}
                write_bundle(
                    targets[name],
                    model,
                    source.tokenizer,
                    extra=extra,
                    assets=source.assets,
                    overwrite=arguments.overwrite,
                )
                if workbench is not None:
                    if recipe.allocation is not None:
                        trials.keep(recipe, workbench)
                    workbench.remove()
            console.print(ledger.table())
            if ledger.allocation is not None:
                _tell_allocation(ledger.allocation)
            for remark in ledger.remarks:
                say(remark)
            say(f"wrote {named[name]}; the ledger is in its manifest.json")


def check_target(name: str, plan: Plan, target: Platform | Literal["none"] | None) -> None:
    """Raises `InputError` for a format that the target, by default this machine, has no kernel for. A recipe may save
    bytes alone: whoever asks for no target hears what this machine has no kernel for, and gets it."""
    here: Platform | None = next((each for each in get_args(Platform) if each == find_platform()), None)
    platform = here if target is None or target == "none" else target
    if platform is None:
        return
    try:
        check_kernels(plan, platform)
    except InputError as missing:
        if target == "none":
            say(f"note: recipe {name}: {missing}; here its dense weight is rebuilt for each product")
            return
        raise InputError(
            f"recipe {name}: {missing}; --target none takes the recipe all the same (its dense weight is then rebuilt "
            "for each product: bytes are saved, time is not)"
        ) from missing


def _tell_workbench(name: str, directory: Path, workbench: Workbench, layers: int) -> None:
    if workbench.discarded:
        changed = ", ".join(workbench.changed)
        say(f"{directory} was left by a run that differed in {changed}: {workbench.discarded} discarded")
    if workbench.found:
        say(f"resuming {name}, of {layers} layers: {workbench.found}")


def _tell_allocation(allocation: Allocation) -> None:
    console.print(allocation.table())
    if allocation.budget > allocation.most:
        say(
            f"the budget of {allocation.budget:,} bytes is more than the candidates can use: "
            f"the best of them hold {allocation.most:,}"
        )


def _report(progress: ProgressBar, name: str, step: str, done: int, total: int) -> None:
    progress(f"{step} to {name}", done, total)
