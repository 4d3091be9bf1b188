"""Trees of weights as named arrays and back: what checkpoints, bundles and exported graphs hold.

A name is the way to an array through the tree: `layers.attention.q` for a dense weight; a packed one has an array a
field, `layers.attention.q.words`, and runs those of each part, `layers.attention.q.parts.0.words`; one with another
inside of it has that one's arrays, `layers.attention.q.base.words`. What names cannot say (the format, its group or
pattern) is one small JSON record a packed weight.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from hsai.errors import InputError
from hsai.formats.codes import Int2, Int3, Int4
from hsai.formats.int4_offset import Int4Offset
from hsai.formats.int8 import Int8
from hsai.formats.nm import NM, NMInt4, NMInt8
from hsai.formats.outliers import Outliers
from hsai.formats.packed import Packed, Weight, check_finite, to_dense
from hsai.formats.rounded import INTEGERS, Rounded
from hsai.formats.runs import Runs
from hsai.formats.ternary import Ternary
from hsai.formats.unstructured import Unstructured, UnstructuredInt4, UnstructuredInt8
from hsai.formats.vnm import VNM, VNMInt4, VNMInt8

T = TypeVar("T")
ROUNDED = "rounded"
PACKED: dict[str, type[Packed]] = {
    "int8": Int8,
    "int4": Int4,
    "int4_offset": Int4Offset,
    "int3": Int3,
    "int2": Int2,
    "ternary": Ternary,
    "nm": NM,
    "nm_int8": NMInt8,
    "nm_int4": NMInt4,
    "vnm": VNM,
    "vnm_int8": VNMInt8,
    "vnm_int4": VNMInt4,
    "unstructured": Unstructured,
    "unstructured_int8": UnstructuredInt8,
    "unstructured_int4": UnstructuredInt4,
    "outliers": Outliers,
    ROUNDED: Rounded,
}
RUNS = "runs"
NAMES: dict[type[Packed], str] = {kind: name for name, kind in PACKED.items()} | {Runs: RUNS}


def join_path(path: tuple[Any, ...]) -> str:
    """A jax key path as a dotted name; the `.value` that every `nnx.Variable` adds is left out."""
    keys = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(key for key in keys if key != "value")


def named_arrays(tree: Any) -> dict[str, Any]:
    """Every array of a tree by its name, in the tree's order."""
    return {join_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fill(tree: T, arrays: Mapping[str, Any]) -> T:
    """`tree` with each array replaced by the one of its name.

    Raises `InputError` that names what is missing, unknown, or of another shape or dtype.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [join_path(path) for path, _ in leaves]
    missing = [name for name in names if name not in arrays]
    unknown = sorted(set(arrays) - set(names))
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is unknown"
        raise InputError(f"weights do not fit the model: {what} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, (_, leaf) in zip(names, leaves, strict=True):
        found = arrays[name]
        if tuple(found.shape) != tuple(leaf.shape) or found.dtype != leaf.dtype:
            raise InputError(
                f"weights do not fit the model: {name!r} is {found.dtype}{list(found.shape)}, "
                f"the model needs {leaf.dtype}{list(leaf.shape)}"
            )
    return jax.tree_util.tree_unflatten(treedef, [arrays[name] for name in names])


def named_weights(tree: Any) -> dict[str, nnx.Param]:
    """Every parameter of a model by its name, whatever the format of its value."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return {join_path(path): leaf for path, leaf in leaves}


def replace_weights(tree: T, values: Mapping[str, Weight]) -> T:
    """A copy of the model in which the named parameters hold other values: dense or packed, arrays or their shapes."""

    def swap(path: tuple[Any, ...], leaf: Any) -> Any:
        name = join_path(path)
        return leaf.replace(values[name]) if name in values else leaf

    return jax.tree_util.tree_map_with_path(swap, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """The JSON record of every parameter: {"format": "int4"} with the static fields of the format, and the record of
    what is inside of it, or "dense"; of runs, {"format": "runs", "parts": [a record each]}."""
    return {name: _describe_weight(param.get_value()) for name, param in named_weights(tree).items()}


def _describe_weight(value: Weight) -> dict[str, Any]:
    if isinstance(value, Runs):
        return {"format": RUNS, "parts": [_describe_weight(part) for part in value.parts]}
    if isinstance(value, Packed):
        record: dict[str, Any] = {"format": NAMES[type(value)]}
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if field.metadata.get("static"):
                record[field.name] = part
            elif isinstance(part, Packed):
                record[field.name] = _describe_weight(part)
        return record
    return {"format": "dense"}


def restore(model: T, records: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, Any]) -> T:
    """The inverse of `describe` and `named_arrays`: puts arrays of any format in the place of `model`'s parameters.

    Raises `InputError` that names a parameter, format or field which is missing, unknown, or of the wrong shape; or an
    array with numbers that `hsai.formats.packed.check_finite` refuses.
    """
    weights = named_weights(model)
    if set(records) != set(weights):
        odd = sorted(set(records) ^ set(weights))[0]
        raise InputError(f"weights do not fit the model: {odd!r} is {'unknown' if odd in records else 'missing'}")
    values: dict[str, Weight] = {}
    used: set[str] = set()
    for name, record in records.items():
        value, names = _restore_weight(name, record, arrays)
        if tuple(value.shape) != tuple(weights[name].get_value().shape):
            raise InputError(
                f"weights do not fit the model: {name!r} has shape {list(value.shape)}, "
                f"the model needs {list(weights[name].get_value().shape)}"
            )
        values[name] = value
        used |= names
    if unknown := sorted(set(arrays) - used):
        raise InputError(f"weights do not fit the model: array {unknown[0]!r} is unknown")
    return replace_weights(model, values)


def _restore_weight(name: str, record: Mapping[str, Any], arrays: Mapping[str, Any]) -> tuple[Weight, set[str]]:
    """The value that a record and its arrays describe, and the names of those arrays."""
    kind = record.get("format")
    if kind == RUNS:
        return _restore_runs(name, record, arrays)
    if kind == "dense":
        _require(name in arrays, f"array {name!r} is missing")
        kind = arrays[name].dtype
        _require(jnp.issubdtype(kind, jnp.floating), f"array {name!r} is {kind}, and a dense weight is floating")
        check_finite(repr(name), arrays[name])
        return arrays[name], {name}
    if kind not in PACKED:
        raise InputError(f"{name!r} has the unknown format {kind!r}; known: dense, {', '.join(NAMES.values())}")
    values: dict[str, Any] = {}
    names: set[str] = set()
    hints = typing.get_type_hints(PACKED[kind])
    for field in dataclasses.fields(PACKED[kind]):
        part = f"{name}.{field.name}"
        if field.metadata.get("static"):
            _require(field.name in record, f"{kind} of {name!r} has no {field.name!r}")
            values[field.name] = record[field.name]
        elif hints[field.name] is Packed:
            inner = record.get(field.name)
            sound = isinstance(inner, Mapping) and inner.get("format") in PACKED
            _require(sound, f"{kind} of {name!r} has no packed {field.name!r}")
            values[field.name], used = _restore_weight(part, inner or {}, arrays)
            names |= used
        else:
            _require(part in arrays, f"array {part!r} is missing")
            negative = field.name != "scale" or PACKED[kind].signed_scale
            check_finite(repr(part), arrays[part], negative=negative)
            values[field.name] = arrays[part]
            names.add(part)
    value = PACKED[kind](**values)
    if isinstance(value, Rounded):
        fits = isinstance(value.base, INTEGERS)
        _require(fits, f"{name!r} is rounded, which is for integers, not for {NAMES[type(value.base)]}")
    try:  # the format's own arithmetic says whether its arrays fit together
        jax.eval_shape(to_dense, value)
    except (ArithmeticError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the arrays of {name!r} do not fit together as {kind}: {reason}") from error
    return value, names


def _restore_runs(name: str, record: Mapping[str, Any], arrays: Mapping[str, Any]) -> tuple[Runs, set[str]]:
    """As `_restore_weight`, of a record with the records of its parts."""
    records = record.get("parts")
    sound = isinstance(records, list) and records and all(isinstance(part, Mapping) for part in records)
    _require(bool(sound), f"{name!r} is of runs, and its record has no list of parts")
    parts: list[Weight] = []
    names: set[str] = set()
    for index, part in enumerate(records or ()):
        _require(part.get("format") != RUNS, f"part {index} of {name!r} is of runs itself")
        value, used = _restore_weight(f"{name}.parts.{index}", part, arrays)
        fits = value.ndim > 2 and value.shape[0] > 0 and (not parts or value.shape[1:] == parts[0].shape[1:])
        _require(fits, f"part {index} of {name!r} has shape {list(value.shape)}, which is no run of its layers")
        parts.append(value)
        names |= used
    return Runs(tuple(parts)), names


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise InputError(f"weights do not fit the model: {fault}")
