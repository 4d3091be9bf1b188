"""Typed overrides of a config from the command line: `--optim.learning-rate 1e-3 --mesh.model 2`.

The options are the fields of the config at hand: a variant of a union or an item of a tuple has the options of what
stands there. tyro prints the help, from the docstrings under the fields, and reads each value, so its rules say how a
type is spelled. The line is split here, because tyro ends the process with a drawn box where a run on many hosts needs
an exception and one line.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from hsai.configuration import (
    choose,
    dataclasses_of,
    describe,
    field_types,
    from_data,
    from_dict,
    join,
    members,
    suggest,
    tags,
    to_data,
    to_dict,
)
from hsai.errors import InputError

C = TypeVar("C")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A field of a config, as the command line sees it."""

    path: str
    """Its path: fields by name and items of tuples by position, joined by dots."""
    hint: Any
    """Its type."""
    variants: Mapping[Any, type] = dataclasses.field(default_factory=dict)
    """If it is the tag of a union: the dataclass that each of its values stands for."""
    is_closed: bool = False
    """Whether it would hold dataclasses and holds none (None, or no items), so that there is nothing to set."""


def parse_overrides(config: C, argv: Sequence[str], *, prog: str, description: str) -> C:
    """`config` with the fields changed that `argv` names; of an option given twice the last counts.

    Hyphens and underscores are the same, `--name value` and `--name=value` too. `--flag` and `--no-flag` set a bool; a
    tuple takes its values one after the other; `None` is spelled so. The tag of a union (`--weight.format nm`) puts
    that variant with its defaults in the place of the present one. All changes are made before the config is checked.

    Raises:
      InputError: an unknown option (the nearest one is named), a value that its type does not accept, or a config
        that its `__post_init__` refuses; one line.
      SystemExit: with code 0, after `-h` or `--help` printed the help.
    """
    if any(token in ("-h", "--help") for token in argv):
        # Without AvoidSubcommands each union would become a subcommand, and the order of options would matter.
        markers = (tyro.conf.AvoidSubcommands,)
        tyro.cli(type(config), default=config, args=["--help"], prog=prog, description=description, config=markers)
    data = to_dict(config)
    given = list(_split(argv))
    options = list_options(type(config), data)
    for name, values in given:
        option = options.get(name)
        if option is not None and option.variants:
            _switch(data, option, _read(option, name, values))
            options = list_options(type(config), data)
    for name, values in given:
        option, value = _find(options, name, values)
        _put(data, option.path, to_data(value, option.path))
    return from_dict(type(config), data)


def list_options(cls: type, data: Mapping[str, Any]) -> dict[str, Option]:
    """The options of the config of type `cls` that `data` (from `to_dict`) describes, by name without the `--`."""
    return {option.path.replace("_", "-"): option for option in _walk(cls, data, "")}


def _walk(hint: Any, data: Any, path: str) -> Iterator[Option]:
    classes = dataclasses_of(hint)
    if classes and isinstance(data, Mapping):
        tag, variants = tags(classes) if len(classes) > 1 else ("", {})
        for name, field_hint in field_types(choose(classes, data, path)).items():
            if name == tag:
                yield Option(path=join(path, name), hint=Literal[tuple(variants)], variants=variants)
            else:
                yield from _walk(field_hint, data[name], join(path, name))
    elif isinstance(data, list) and data and _holds_dataclasses(hint):
        (items,) = [typing.get_args(member) for member in members(hint) if typing.get_origin(member) is tuple]
        for index, item in enumerate(data):
            yield from _walk(items[0 if items[1:] == (...,) else index], item, join(path, index))
    else:
        yield Option(path=path, hint=hint, is_closed=_holds_dataclasses(hint))


def _holds_dataclasses(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or any(_holds_dataclasses(argument) for argument in typing.get_args(hint))


def _split(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option of the line, its name without the `--` and with hyphens, and the values that follow it."""
    name, values = "", list[str]()
    for token in argv:
        if not _is_option(token):
            if not name:
                raise InputError(f"unexpected argument {token!r}; options are spelled --name value")
            values.append(token)
            continue
        if name:
            yield name, values
        name, equals, value = token.removeprefix("--").partition("=")
        name, values = name.replace("_", "-"), [value] if equals else []
        if not name or not token.startswith("--"):
            raise InputError(f"unknown option {token}; options are spelled --name value")
    if name:
        yield name, values


def _is_option(token: str) -> bool:
    """Whether a token names an option; "-", "-3" and "-inf" are values."""
    if not token.startswith("-") or token == "-":
        return False
    with contextlib.suppress(ValueError):
        float(token)
        return False
    return True


def _find(options: Mapping[str, Option], name: str, values: list[str]) -> tuple[Option, Any]:
    """The option called `name`, or negated by it, and the value that it is given."""
    option = options.get(name)
    if option is not None and not option.is_closed:
        return option, _read(option, name, values)
    head, dot, leaf = name.rpartition(".")
    negated = options.get(f"{head}{dot}{leaf.removeprefix('no-')}")
    if leaf.startswith("no-") and negated is not None and negated.hint is bool:
        if values:
            raise InputError(f"--{name} takes no value, got {' '.join(values)!r}")
        return negated, False
    for other, closed in options.items():
        if closed.is_closed and f"{name}.".startswith(f"{other}."):
            raise InputError(f"--{name} cannot be set: this config has no {closed.path}; give it one in a config file")
    names = [f"--{other}" for other, option in options.items() if not option.is_closed]
    raise InputError(f"unknown option --{name}; {suggest(f'--{name}', names)}")


def _read(option: Option, name: str, values: list[str]) -> Any:
    """The value of the option's type that is spelled by `values`."""
    if option.hint is bool and not values:
        return True
    # Python's spelling is the one in the help; that of every other config language is taken too.
    words = {"none": "None"} if NoneType in members(option.hint) else {}
    words |= {"true": "True", "false": "False"} if option.hint is bool else {}
    values = [words.get(value.lower(), value) for value in values]
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(option.hint, set()))
    if not isinstance(spec, PrimitiveConstructorSpec):
        raise TypeError(f"{option.path}: a command line cannot spell {describe(option.hint)}")
    counts = (spec.nargs,) if isinstance(spec.nargs, int) else spec.nargs
    fits = counts == "*" or len(values) in counts
    if fits and (spec.choices is None or set(values) <= set(spec.choices)):
        with contextlib.suppress(ValueError):
            return spec.instance_from_str(values)
    got = repr(" ".join(values)) if values else "nothing"
    raise InputError(f"--{name}: expected {describe(option.hint)}, got {got}")


def _switch(data: dict[str, Any], option: Option, choice: Any) -> None:
    """Puts the variant that `choice` stands for in the place of the present one, unless it is that."""
    path, _, tag = option.path.rpartition(".")
    if _get(data, option.path) != choice:
        variant = from_data(option.variants[choice], {tag: choice}, path)
        _put(data, path, to_data(variant, path))


def _get(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data[int(key) if isinstance(data, list) else key]
    return data


def _put(data: dict[str, Any], path: str, value: Any) -> None:
    head, dot, key = path.rpartition(".")
    place: Any = _get(data, head) if dot else data
    place[int(key) if isinstance(place, list) else key] = value
