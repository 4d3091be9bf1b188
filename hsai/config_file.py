"""Loads an experiment: a Python file whose `get_config()` returns its config.

A fork is one file and one changed line, from whatever directory it is run:

    import dataclasses
    from configs import quickstart

    def get_config():
        return dataclasses.replace(quickstart.get_config(), steps=200)

`configs` is here the folder that the file stands in (or the outermost one of that name around it), no installed
package: while the file is loaded, the folder that contains it can be imported from. Afterwards `sys.path` and
`sys.modules` are what they were, so two checkouts loaded one after the other cannot mix. The module that a fork imports
is its parent, and a run shows what it changed in it.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from hsai.configuration import from_dict, suggest, to_dict
from hsai.errors import InputError

C = TypeVar("C")

_MODULE = "hsai_config_file"  # what the file is called in sys.modules while it is loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded(Generic[C]):
    """A config and, for a fork, what it was forked from."""

    config: C
    """What `get_config()` returned, with the type of every field checked."""
    parent: C | None = None
    """The parent's config; None unless the file imports exactly one module with a `get_config()`."""
    parent_name: str | None = None
    """The parent's name, such as "quickstart"."""


def load_config(path: str | Path, kind: type[C]) -> Loaded[C]:
    """Runs the config file at `path` and returns the `kind` that its `get_config()` gives, and the parent's.

    Raises:
      InputError: no such file (the nearest one beside it is named), no `get_config`, a result that is no `kind` or has
        a field of the wrong type, or any exception in the file, with its line.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no config file {file}; {_suggest_beside(file)}")
    if file.suffix != ".py":
        raise InputError(f"{file} is no config file: its name must end in .py")
    root = _find_root(file.resolve().parent)
    with _importable(root), _blamed(file, root):
        module = _run(file.resolve())
        if not callable(getattr(module, "get_config", None)):
            raise _Unusable("it defines no get_config()")
        config = _call(module, kind, "get_config()")
        parents = {
            id(value): value
            for value in vars(module).values()
            if isinstance(value, types.ModuleType) and callable(getattr(value, "get_config", None))
        }
        if len(parents) != 1:
            return Loaded(config=config)
        (parent,) = parents.values()
        name = parent.__name__.rpartition(".")[2]
        return Loaded(config=config, parent=_call(parent, kind, f"get_config() of its parent {name}"), parent_name=name)


class _Unusable(Exception):
    """The file ran, but what it holds cannot be used; the message says why."""


def _suggest_beside(file: Path) -> str:
    if not file.parent.is_dir():
        return f"the directory {file.parent} does not exist"
    return suggest(str(file), sorted(str(beside) for beside in file.parent.glob("*.py")))


def _find_root(folder: Path) -> Path:
    """The folder whose name imports begin with: the outermost `configs` around the file, or else the file's own."""
    named = [parent for parent in (folder, *folder.parents) if parent.name == "configs"]
    return named[-1] if named else folder


def _run(file: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(_MODULE, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    spec.loader.exec_module(module)
    return module


def _call(module: types.ModuleType, kind: type[C], what: str) -> C:
    """The config of `module`, each field checked against its type: Python itself would let `steps="10"` pass."""
    config: Any = module.get_config()
    if not isinstance(config, kind):
        raise _Unusable(f"{what} must return {kind.__name__}, not {type(config).__name__}")
    try:
        return from_dict(type(config), to_dict(config))
    except InputError as error:
        raise _Unusable(str(error)) from error


@contextlib.contextmanager
def _importable(root: Path) -> Iterator[None]:
    """Lets `from <root's name> import <a config>` find the files below `root`, and undoes it afterwards."""
    path, bytecode, before = list(sys.path), sys.dont_write_bytecode, _modules_of(root.name)
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(root.parent))
    sys.dont_write_bytecode = True  # a cache keyed by the second could hide an edit, and would litter the folder
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        sys.modules.pop(_MODULE, None)
        for name in _modules_of(root.name):
            del sys.modules[name]
        sys.modules.update(before)


def _modules_of(package: str) -> dict[str, types.ModuleType]:
    """The imported modules of a plain folder called `package`; none if a regular package has that name.

    A folder of configs may happen to be called like a library: the program's modules must then stay what they are.
    """
    if getattr(sys.modules.get(package), "__file__", None) is not None:
        return {}
    return {name: module for name, module in sys.modules.items() if name == package or name.startswith(f"{package}.")}


@contextlib.contextmanager
def _blamed(file: Path, root: Path) -> Iterator[None]:
    """Turns whatever goes wrong inside of a config file into one line that names the file and the line."""
    try:
        yield
    except _Unusable as error:
        raise InputError(f"{file}: {error}") from error
    except SyntaxError as error:
        place = f"{error.filename or file} line {error.lineno}"
        raise InputError(f"{place}: {type(error).__name__}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())
        if not isinstance(error, InputError):
            message = f"{type(error).__name__}: {message}"
        raise InputError(f"{_place(error, file, root)}: {message}") from error


def _place(error: BaseException, file: Path, root: Path) -> str:
    """The innermost line of the traceback that stands below `root`: in the file itself or in a parent of it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if root in Path(frame.filename).parents]
    if not frames:
        return str(file)
    name = Path(frames[-1].filename)
    return f"{file if name == file.resolve() else name} line {frames[-1].lineno}"
