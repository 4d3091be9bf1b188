"""Graphs: the model's steps as StableHLO, with the weights as arguments, for jax and for runtimes without it.

A graph is traced with the reference kernels, so that it holds no custom call and any StableHLO compiler takes it; on
demand there are further ones with the kernels of a target (`hsai.export.targets`), and the manifest names the custom
calls that a runtime must bring for them. Each is written twice. `NAME.jax` is what `jax.export` reads, a portable one
for several platforms at once; such a module begins with an argument that says on which platform it runs.
`NAME.stablehlo` is the module for other runtimes, without that argument: with the reference kernels one module serves
every platform.

Donation: `jax.export` keeps `donate_argnums` as `tf.aliasing_output` attributes in the module, so a runtime that reads
StableHLO may update the cache in place; but `Exported.call` does not donate. Whoever calls through jax wraps it in
`jax.jit(exported.call, donate_argnames=...)` again, as `hsai.infer` does.
"""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

import hsai_kernels
from hsai.errors import InputError
from hsai.export.manifest import ArrayRecord, GraphRecord
from hsai.export.steps import (
    CACHE_NAMES,
    DECODE_INPUTS,
    OUTPUTS,
    PREFILL_INPUTS,
    cache_shapes,
    make_decode,
    make_prefill,
)
from hsai.export.targets import TARGETS, check_target, trace_for
from hsai.files import atomic_write
from hsai.models import CacheFormat, TransformerConfig
from hsai.models.cache import check_cache_format
from hsai_kernels import native

logger = logging.getLogger(__name__)

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
GRAPHS = "graphs"
TRITON = "__gpu$xla.gpu.triton"
"""The custom call of Pallas' kernels for GPUs; that of TPUs is one that jax warrants."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Which graphs a bundle holds: shapes are fixed when a graph is made."""

    prefill_buckets: tuple[int, ...] = (32, 128, 512)
    """Tokens a prefill call takes, one graph each; those beyond the context are cut to it."""

    batch: int = 1
    """Rows that are decoded together."""

    context: int | None = None
    """Tokens that the cache holds for each row; none takes the model's max_length."""

    cache: CacheFormat = "activations"
    """What the cache stores its numbers as: the activations' dtype, bfloat16, or int8 or int4 with scales."""

    stablehlo_version: str | None = None
    """Of the portable bytecode, such as "1.0.0", for runtimes older than this jax; none takes the one that jax takes
    for other machines, which StableHLO promises to read for five years."""

    kernels: tuple[str, ...] = ()
    """Targets for which there are graphs with kernels as well (`hsai.export.targets.TARGETS`)."""

    def __post_init__(self) -> None:
        if not self.prefill_buckets:
            raise InputError("prefill_buckets=() is empty; give at least one size, such as 128")
        for bucket in self.prefill_buckets:
            if bucket < 1:
                raise InputError(f"prefill_buckets: {bucket} must be at least 1")
        if self.batch < 1:
            raise InputError(f"batch={self.batch} must be at least 1")
        if self.context is not None and self.context < 1:
            raise InputError(f"context={self.context} must be at least 1, or none for the model's max_length")
        check_cache_format(self.cache)
        for name in self.kernels:
            check_target(name)
        if len(set(self.kernels)) < len(self.kernels):
            raise InputError(f"kernels={', '.join(self.kernels)} names a target twice")
        if self.stablehlo_version is not None:
            _check_version(self.stablehlo_version)

    def slots(self, model: TransformerConfig) -> int:
        """Tokens that a row of the cache holds; `InputError` if that is more than the model was made for."""
        if self.context is not None and self.context > model.max_length:
            raise InputError(f"context={self.context} exceeds the model's max_length={model.max_length}")
        return self.context or model.max_length

    def buckets(self, model: TransformerConfig) -> tuple[int, ...]:
        """The sizes of the prefill graphs, ascending, each once, none beyond the context."""
        return tuple(sorted({min(bucket, self.slots(model)) for bucket in self.prefill_buckets}))


def export_graphs(
    directory: Path,
    model: TransformerConfig,
    formats: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Any],
    config: GraphConfig,
) -> tuple[GraphRecord, ...]:
    """Writes the prefill graphs and the decode graph into `directory`/graphs.

    Args:
      directory: of the bundle.
      model: the model's config.
      formats: of its weights (`hsai.formats.storage.describe`).
      weights: arrays, or their shapes, by name (`hsai.formats.storage.named_arrays`); only shapes and dtypes are used.
      config: which graphs.
    Returns: a record for each graph, for the manifest.
    Raises:
      InputError: the context exceeds the model's.
      RuntimeError: called inside of a mesh, for whose devices jax would then make the graph.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        raise RuntimeError("graphs are for one device: export them outside of use_mesh")
    (directory / GRAPHS).mkdir()
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    slots = config.slots(model)
    cache = cache_shapes(model, config.batch, slots, config.cache)
    packed = any(record["format"] != "dense" for record in formats.values())
    records = []
    for kernels in (None, *config.kernels):
        shared = (slots, config, kernels, packed)
        for length in config.buckets(model):
            count = jax.ShapeDtypeStruct((config.batch,), jnp.int32)
            arguments = (shapes, jax.ShapeDtypeStruct((config.batch, length), jnp.int32), count, *cache)
            step = make_prefill(model, formats)
            name = f"prefill_{length}"
            records.append(_write_graph(directory, name, step, PREFILL_INPUTS, arguments, *shared))
        arguments = (shapes, jax.ShapeDtypeStruct((config.batch, 1), jnp.int32), *cache)
        step = make_decode(model, formats)
        records.append(_write_graph(directory, "decode", step, DECODE_INPUTS, arguments, *shared))
    return tuple(records)


def load_graph(directory: Path, record: GraphRecord) -> jax.export.Exported:
    """The graph of a bundle that was verified; `InputError` if this jax is too old or too new to run it."""
    path = directory / record.jax_file
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    if not oldest <= exported.calling_convention_version <= newest:
        version = f"version {exported.calling_convention_version} of jax's calling convention"
        raise InputError(f"{path} has {version}, and jax {jax.__version__} runs {oldest} to {newest}; export it again")
    return exported


def export_step(step: Callable[..., Any], arguments: tuple[Any, ...], platforms: Sequence[str]) -> jax.export.Exported:
    """A step of `hsai.export.steps` with the shapes of `arguments`, its cache donated, free of custom calls."""
    jitted = jax.jit(step, donate_argnames=CACHE_NAMES)
    with hsai_kernels.prefer("reference"), _hide_sources():
        return jax.export.export(jitted, platforms=platforms)(*arguments)


def export_with_kernels(step: Callable[..., Any], arguments: tuple[Any, ...], kernels: str) -> jax.export.Exported:
    """The same with the kernels of a target, for that alone."""
    # jax warrants nothing of custom calls that it does not know: whoever runs this has the kernels of this version.
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (*native.NAMES, TRITON)]
    jitted = jax.jit(step, donate_argnames=CACHE_NAMES)
    with trace_for(kernels), _hide_sources():
        platform = TARGETS[kernels].platform
        return jax.export.export(jitted, platforms=[platform], disabled_checks=checks)(*arguments)


def _write_graph(
    directory: Path,
    name: str,
    step: Callable[..., Any],
    inputs: tuple[str, ...],
    arguments: tuple[Any, ...],
    slots: int,
    config: GraphConfig,
    kernels: str | None,
    packed: bool,
) -> GraphRecord:
    if kernels is None:
        portable, exported = (export_step(step, arguments, platforms) for platforms in (PLATFORMS[:1], PLATFORMS))
    else:
        portable = exported = export_with_kernels(step, arguments, kernels)
    file = name if kernels is None else f"{name}.{kernels}"
    version = config.stablehlo_version
    text = portable.mlir_module()
    custom_calls = find_custom_calls(text)
    if kernels is not None and not custom_calls:
        raise InputError(f"kernels={kernels!r}: none of hsai's kernels for it serves graph {name} of this model here")
    if kernels is not None and packed and not count_products(text):
        fault = "no product with a packed weight has a kernel, and each call rebuilds dense weights"
        logger.warning("graph %s for %s: %s", name, kernels, fault)
    described = _describe_inputs(inputs, arguments)
    if len(portable.module_kept_var_idx) != len(described):
        dropped = sorted(set(range(len(described))) - set(portable.module_kept_var_idx))
        raise RuntimeError(f"graph {name} does not read its input {described[dropped[0]].name!r}")
    module = portable.mlir_module_serialized if version is None else _convert(portable.mlir_module_serialized, version)
    files = {"jax": bytes(exported.serialize()), "stablehlo": module}
    for suffix, content in files.items():
        with atomic_write(directory / GRAPHS / f"{file}.{suffix}") as temporary:
            temporary.write_bytes(content)
    tokens = arguments[1]
    return GraphRecord(
        name=name,
        step="decode" if name == "decode" else "prefill",
        tokens=tokens.shape[1],
        batch=tokens.shape[0],
        slots=slots,
        kernels=kernels,
        jax_file=f"{GRAPHS}/{file}.jax",
        stablehlo_file=f"{GRAPHS}/{file}.stablehlo",
        platforms=exported.platforms,
        stablehlo_version=_read_version(module),
        inputs=described,
        outputs=tuple(_describe(n, aval) for n, aval in zip(OUTPUTS, portable.out_avals, strict=False)),
        donated=tuple(index for index, record in enumerate(described) if record.name in CACHE_NAMES),
        custom_calls=custom_calls,
    )


def find_custom_calls(module: str) -> tuple[str, ...]:
    """The targets of the custom calls in a StableHLO module's text, in both of the forms that it may take."""
    found = re.findall(r"custom_call\s+@([\w.$-]+)|call_target_name\s*=\s*\"([^\"]+)\"", module)
    return tuple(sorted({first or second for first, second in found}))


def count_products(module: str) -> int:
    """How many of the custom calls in a module's text multiply by packed weights, as the names of kernels say."""
    product = r"(?:quantized|sparse)_matmul"
    return len(re.findall(rf"custom_call @hsai_{product}|name = \"(?:multiply_|{product}\")", module))


def _describe_inputs(inputs: tuple[str, ...], arguments: tuple[Any, ...]) -> tuple[ArrayRecord, ...]:
    """The arguments in the order in which jax flattens them: weights come sorted by their names."""
    weights, *others = arguments
    named = [*sorted(weights.items()), *zip(inputs[1:], others, strict=False)]
    return tuple(_describe(name, shape) for name, shape in named)


def _describe(name: str, shape: Any) -> ArrayRecord:
    return ArrayRecord(name=name, shape=tuple(shape.shape), dtype=str(shape.dtype))


def _check_version(version: str) -> None:
    """Raises `InputError` unless this jax can write that version."""
    oldest, newest = stablehlo.get_minimum_version(), stablehlo.get_current_version()
    found = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None or not _split(oldest) <= _split(version) <= _split(newest):
        raise InputError(f"stablehlo_version={version!r} cannot be written; valid are {oldest} to {newest}")


def _split(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _convert(module: bytes, version: str) -> bytes:
    """Portable bytecode in another version; `InputError` if the graph needs what that version does not have."""
    context = ir.Context()
    stablehlo.register_dialect(context)
    try:
        return bytes(
            stablehlo.serialize_portable_artifact(stablehlo.deserialize_portable_artifact(context, module), version)
        )
    except ValueError as error:
        raise InputError(f"stablehlo_version={version!r} cannot hold this graph; choose a later one") from error


def _read_version(module: bytes) -> str:
    """The version in the head of StableHLO's portable bytecode."""
    found = re.match(rb"ML\xefR.StableHLO_v([0-9.]+)\x00", module, re.DOTALL)
    if found is None:
        raise RuntimeError(f"jax {jax.__version__} did not write portable StableHLO bytecode: {module[:32]!r}")
    return found[1].decode("ascii")


@contextlib.contextmanager
def _hide_sources() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of the module, so that equal models give equal bytes."""
    option = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, limit)
