"""The house stands as docs/architecture.md draws it: a room imports only rooms below it, and no file grows too long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top of the house down; a module may import from its own room and from every later one.
ROOMS = [
    ("hsai.cli",),
    ("hsai.evaluate",),
    ("hsai.serve",),
    ("hsai.infer",),
    ("hsai.export",),
    ("hsai.interop",),
    ("hsai.train",),
    ("hsai.config",),
    ("hsai.compress",),
    ("hsai.data",),
    ("hsai.fetch",),
    ("hsai.models",),
    ("hsai.formats",),
    ("hsai.shards",),
    (
        "hsai.allocator",
        "hsai.sharding",
        "hsai.devices",
        "hsai.machine",
        "hsai.processes",
        "hsai.progress",
        "hsai.signals",
    ),
    ("hsai.config_file", "hsai.overrides"),
    ("hsai.configuration",),
    ("hsai.files",),
    ("hsai.errors",),
    ("hsai_kernels",),
]

# RunConfig composes configs that stand in the training room, beside the code which reads them: the one way up.
COMPOSED = {"hsai.train.checkpoint", "hsai.train.loop", "hsai.train.optimizer"}


def find_modules() -> dict[str, Path]:
    """Every source module by its import name."""
    modules = {}
    for base, package in ((ROOT, "hsai"), (ROOT / "kernels", "hsai_kernels")):
        for path in (base / package).rglob("*.py"):
            modules[".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")] = path
    return modules


def floor(module: str) -> int | None:
    """The index of a module's room, or None for what is not ours."""
    for index, names in enumerate(ROOMS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return index
    return None


def runtime_imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs; those under `if TYPE_CHECKING` are for readers only."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {id(child) for child in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


MODULES = find_modules()


def test_every_module_has_a_room() -> None:
    assert [name for name in MODULES if floor(name) is None and name != "hsai"] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name != "hsai"])
def test_imports_go_down(module: str) -> None:
    own = floor(module)
    assert own is not None
    allowed = COMPOSED if module == "hsai.config" else set()
    found = {name: floor(name) for name in runtime_imports(MODULES[module]) - allowed}
    up = [name for name, other in found.items() if other is not None and other < own]
    assert up == [], f"{module} imports rooms above it: {up}"


def test_kernels_stand_alone() -> None:
    for name, path in MODULES.items():
        if name.startswith("hsai_kernels"):
            assert not [found for found in runtime_imports(path) if found.split(".")[0] == "hsai"], name


@pytest.mark.parametrize("module", MODULES)
def test_module_is_readable(module: str) -> None:
    text = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(text)), f"{module} does not say what it is"
    assert len(text.splitlines()) <= 400, f"{module} holds more than one idea"
