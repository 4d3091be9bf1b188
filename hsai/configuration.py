"""Turns any tree of config dataclasses into plain data and back, strictly, and says where two trees differ.

A run stores its resolved config beside its results, and a checkpoint or a bundle is only as good as the config that is
read back with it. So reading is strict (an unknown key, a missing one or a value of another type is refused, with its
path), and what is written is read back equal. A tree is made of frozen dataclasses whose fields hold None, bool, int,
float, str, Path, Literal, tuples and dataclasses of these, and unions. A union of dataclasses is told apart by a tag: a
field of the same name in each, typed as a Literal of its own (`format: Literal["int4"] = "int4"`).

Nothing here knows any particular config: `hsai/config.py` composes them, `hsai/config_file.py` loads experiments, and
`hsai/overrides.py` reads the command line.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from hsai.errors import InputError

C = TypeVar("C")

_SCALARS = (type(None), bool, int, str)
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass `config` as nested dicts and lists that JSON can hold, fields in the order of their declaration.

    Tuples become lists, paths strings, and infinite floats "inf" and "-inf", since JSON has no word for them.

    Raises:
      InputError: a field holds what a config cannot (a list, an array, NaN); with its path.
    """
    return {name: to_data(getattr(config, name), name) for name in field_types(type(config))}


def to_json(config: Any) -> str:
    """`to_dict(config)` as text, two spaces a level and a newline at the end: equal configs give equal bytes."""
    return json.dumps(to_dict(config), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_dict(cls: type[C], data: Mapping[str, Any]) -> C:
    """The config of type `cls` that `data` describes; `from_dict(type(c), to_dict(c)) == c`.

    A key that is absent takes the field's default. An integer is accepted for a float, and nothing else is converted.

    Raises:
      InputError: an unknown key, a missing key without a default, a value of another type, or a value that the
        `__post_init__` of its dataclass refuses; one line with the path, such as `optim.learning_rate`.
      TypeError: a field of `cls` has a type that no config can have, which is a defect of `cls`.
    """
    config: C = from_data(cls, data, "")
    return config


def difference(config: Any, parent: Any) -> list[str]:
    """What `config` changes in `parent`: one line a field, such as `optim.learning_rate: 0.0003 -> 0.001`."""
    return list(_compare(config, parent, ""))


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of a message that refuses `name`: the valid name nearest to it, or all of them where none is near."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"valid: {', '.join(names) or 'none'}"


def field_types(cls: Any) -> Mapping[str, Any]:
    """The type of each field of the dataclass `cls`, in the order of their declaration, with strings resolved."""
    hints = typing.get_type_hints(cls)
    return types.MappingProxyType({field.name: hints[field.name] for field in dataclasses.fields(cls)})


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union (`NoneType` among them); of any other type, the type alone."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def dataclasses_of(hint: Any) -> list[Any]:
    """Those of the alternatives of `hint` that are dataclasses."""
    return [member for member in members(hint) if dataclasses.is_dataclass(member)]


def tags(classes: Iterable[type]) -> tuple[str, dict[Any, type]]:
    """The field that tells the dataclasses of a union apart, and the class that each of its values stands for.

    Raises:
      TypeError: no field is a Literal in every class, with values that no two classes share.
    """
    several = list(classes)
    for name in field_types(several[0]):
        hints = [field_types(cls).get(name) for cls in several]
        choices = [(choice, cls) for cls, hint in zip(several, hints, strict=True) for choice in typing.get_args(hint)]
        if all(typing.get_origin(hint) is Literal for hint in hints) and len(dict(choices)) == len(choices):
            return name, dict(choices)
    raise TypeError(f"no Literal field tells {', '.join(cls.__name__ for cls in several)} apart")


def describe(hint: Any) -> str:
    """A type in the words of an error message: `float or None`, `'adamw' or 'muon'`, `tuple of int`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is types.NoneType:
        return "None"
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return f"tuple of {describe(arguments[0])}"
    if origin is tuple:
        return f"tuple of ({', '.join(describe(argument) for argument in arguments)})"
    if len(members(hint)) > 1:
        return " or ".join(describe(member) for member in members(hint))
    return str(hint.__name__)


def to_data(value: Any, path: str) -> Any:
    """One value of a config, at `path`, as JSON can hold it; raises as `to_dict`."""
    if type(value) in _SCALARS:
        return value
    if type(value) is float and not math.isnan(value):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if type(value) is tuple:
        return [to_data(item, join(path, index)) for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_data(getattr(value, name), join(path, name)) for name in field_types(type(value))}
    kind = "NaN" if type(value) is float else f"of type {type(value).__name__}"
    held = "None, bool, int, float, str, Path, tuples and dataclasses"
    raise InputError(f"{path}: {_shorten(value)} is {kind}; a config holds {held}")


def join(path: str, name: str | int) -> str:
    """The path of a field or an item of what stands at `path`."""
    return f"{path}.{name}" if path else str(name)


def from_data(hint: Any, data: Any, path: str) -> Any:
    """The value of type `hint`, to stand at `path`, that `data` describes; raises as `from_dict`."""
    origin = typing.get_origin(hint)
    if len(members(hint)) > 1:
        return _build_union(hint, data, path)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, data, path)
    if origin is tuple:
        return _build_tuple(hint, data, path)
    if origin is Literal:
        accepted = [choice for choice in typing.get_args(hint) if type(choice) is type(data) and choice == data]
        if not accepted:
            raise _refusal(hint, data, path)
        return data
    if hint in _SCALARS:
        if type(data) is not hint:
            raise _refusal(hint, data, path)
        return data
    if hint is float:
        if type(data) not in (int, float) and not (type(data) is str and data in _INFINITIES):
            raise _refusal(hint, data, path)
        return _INFINITIES[data] if type(data) is str else float(data)
    if hint is Path:
        if type(data) is not str:
            raise _refusal(hint, data, path)
        return Path(data)
    raise TypeError(f"{path}: no config can have a field of type {hint}")


def _build_tuple(hint: Any, data: Any, path: str) -> tuple[Any, ...]:
    arguments = typing.get_args(hint)
    if type(data) not in (list, tuple):
        raise _refusal(hint, data, path)
    if arguments[1:] == (...,):
        arguments = arguments[:1] * len(data)
    if len(arguments) != len(data):
        raise _refusal(hint, data, path)
    return tuple(
        from_data(argument, item, join(path, index))
        for index, (argument, item) in enumerate(zip(arguments, data, strict=True))
    )


def _build_union(hint: Any, data: Any, path: str) -> Any:
    classes = dataclasses_of(hint)
    if classes and isinstance(data, Mapping):
        return _build_dataclass(choose(classes, data, path), data, path)
    others = [member for member in members(hint) if member not in classes]
    for member in sorted(others, key=lambda member: type(data) is not member):  # 1 is an int before it is a float
        try:
            return from_data(member, data, path)
        except InputError:
            continue
    raise _refusal(hint, data, path)


def choose(classes: Sequence[type], data: Mapping[str, Any], path: str) -> type:
    """The dataclass of a union that the tag in `data` stands for; raises `InputError` if there is none."""
    if len(classes) == 1:
        return classes[0]
    name, choices = tags(classes)
    if name not in data:
        raise InputError(f"{join(path, name)} is missing; valid: {', '.join(map(str, choices))}")
    for choice, cls in choices.items():
        if type(choice) is type(data[name]) and choice == data[name]:
            return cls
    raise InputError(f"{join(path, name)}: {_shorten(data[name])} is unknown; {suggest(str(data[name]), choices)}")


def _build_dataclass(cls: Any, data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise _refusal(cls, data, path)
    hints = field_types(cls)
    for key in data:
        if key not in hints:
            nearest = suggest(str(key), hints)
            raise InputError(f"{join(path, str(key))}: {cls.__name__} has no field {str(key)!r}; {nearest}")
    for field in dataclasses.fields(cls):
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in data and not optional:
            raise InputError(f"{join(path, field.name)} is missing; expected {describe(hints[field.name])}")
    values = {name: from_data(hints[name], item, join(path, name)) for name, item in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        message = " ".join(str(error).split())
        named = not path or message.startswith((f"{path}.", f"{path}=", f"{path}:"))
        raise InputError(message if named else f"{path}: {message}") from error


def _compare(config: Any, parent: Any, path: str) -> Iterable[str]:
    if type(config) is type(parent) and dataclasses.is_dataclass(config):
        for name in field_types(type(config)):
            yield from _compare(getattr(config, name), getattr(parent, name), join(path, name))
    elif type(config) is type(parent) is tuple and any(map(dataclasses.is_dataclass, config + parent)):
        both = min(len(config), len(parent))
        for index in range(both):
            yield from _compare(config[index], parent[index], join(path, index))
        yield from (f"{join(path, index)}: absent -> {config[index]!r}" for index in range(both, len(config)))
        yield from (f"{join(path, index)}: {parent[index]!r} -> absent" for index in range(both, len(parent)))
    elif config != parent:
        yield f"{path}: {parent!r} -> {config!r}"


def _refusal(hint: Any, data: Any, path: str) -> InputError:
    return InputError(f"{path or 'config'}: expected {describe(hint)}, got {_shorten(data)}")


def _shorten(value: Any) -> str:
    """`repr(value)` on one line of bounded length."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
