"""A whole model in our engine beside others: tokens one by one, a prompt, and many streams at once.

Each side reads the same weights, in its own formats: ours packs the model as it is opened, llama.cpp reads GGUF files
that our export writes of it (q4_0, and q8_0), with the table that projects to logits in 8 bits on both sides; of the
others, scripts/bench/other_engines.py tells. Speed does not depend on what the numbers are, so ours are rounded to the
nearest, and no quality is claimed here.

Ours chooses the likeliest token and reads that; llama.cpp is told which token comes next, and makes its logits.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.llama import EMBED, FFN, HEAD_DIM, HEADS, KV_HEADS, LAYERS
from bench.llama import PACKAGES as LLAMA
from bench.llama_context import Work, make_llama
from bench.other_engines import (
    CTRANSLATE2,
    ONNX_GENAI,
    convert_ctranslate2,
    convert_onnx_genai,
    make_ctranslate2,
    make_onnx_genai,
)
from bench.peers import find_absent
from bench.products import multiplies_integers
from bench.timing import Case, Runner
from hsai.data.tokenizer import Tokenizer
from hsai.export.checkpoint import export_checkpoint
from hsai.export.gguf import export_gguf
from hsai.export.source import ModelSource
from hsai.export.stablehlo import GraphConfig
from hsai.formats import (
    Activations,
    FormatConfig,
    Int4Config,
    Int8Config,
    NMInt4Config,
    VNMInt4Config,
    Weight,
    find_activations,
    nbytes,
    take_activations,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.infer.bench import Bench
from hsai.infer.runtime import TracedRuntime
from hsai.interop.gguf_write import GgufType
from hsai.models import Transformer, TransformerConfig
from hsai_kernels import native

READ = 64
"""Tokens of each stream before those that are written."""

WRITTEN = 64
"""Tokens that a run writes, in each stream."""

PROMPT = 512
"""Tokens of the prompt."""

FORMATS: Mapping[str, FormatConfig] = {
    "int4": Int4Config(),
    "2:4 int4": NMInt4Config(),
    "64:2:8 int4": VNMInt4Config(),
    "int8": Int8Config(),
}
"""Of the blocks; what reads and what makes tokens is int8."""

GGUF_TYPES: tuple[GgufType, ...] = ("q4_0", "q8_0")

PEERS = {"llama.cpp": LLAMA, "onnxruntime-genai": ONNX_GENAI, "CTranslate2": CTRANSLATE2}
"""And the packages they need."""


def make_tiny_llama(vocab: int) -> TransformerConfig:
    """TinyLlama-1.1B's shape with another vocabulary (theirs is 32000)."""
    return TransformerConfig(
        vocab=vocab,
        embed=EMBED,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        mlp=FFN,
        max_length=2048,
        tie_embeddings=False,
        dtype="float32",
    )


def draw_model(config: TransformerConfig) -> Transformer:
    """Random weights."""
    return Transformer(config, rngs=nnx.Rngs(0))


def pack_model(model: Transformer, format: FormatConfig) -> Transformer:
    """The model with its blocks' matrices in `format`, and its tables in int8."""
    values: dict[str, Weight] = {}
    for name, param in named_weights(model).items():
        value = param.get_value()
        if name.startswith("layers.") and value.ndim == 3:
            values[name] = jax.jit(_fit(format, value.shape[-2]).pack)(value)
        elif value.ndim == 2 and not name.startswith("layers."):
            values[name] = jax.jit(Int8Config().pack)(value)
    return replace_weights(model, values)


def _fit(format: FormatConfig, contraction: int) -> FormatConfig:
    """The format with groups that divide a contraction."""
    group = getattr(format, "group", None)
    return format if group is None else dataclasses.replace(format, group=math.gcd(group, contraction))  # type: ignore[call-arg]


def list_products(model: Transformer) -> tuple[list[Weight], Weight]:
    """The weights that a token is multiplied by: stacks of those of all layers, and the one that makes logits."""
    named = {name: param.get_value() for name, param in named_weights(model).items()}
    blocks = [value for name, value in named.items() if name.startswith("layers.") and value.ndim == 3]
    return blocks, named["embed" if model.config.tie_embeddings else "unembed"]


class Watch:
    """How long runs took, and how long kernels ran in them."""

    def __init__(self) -> None:
        self._seconds = self._in_kernels = 0.0

    def over(self, run: Callable[[], object]) -> Callable[[], object]:
        """`run`, watched; not when it first runs, which compiles."""
        ran = False

        def watched() -> None:
            nonlocal ran
            begun, before = time.perf_counter(), native.kernel_seconds()
            run()
            if ran:
                self._seconds += time.perf_counter() - begun
                self._in_kernels += native.kernel_seconds() - before
            ran = True

        return watched

    def tell(self) -> dict[str, Any]:
        """The share of the time that no kernel ran."""
        return {"outside_of_kernels": 1 - self._in_kernels / self._seconds}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
    """Who is compared: a model in each of our formats, and others as they run it alone, and in many streams."""

    name: str
    source: ModelSource
    formats: Sequence[str]
    activations: Sequence[Activations]
    alone: Sequence[Callable[..., Runner]]
    together: Sequence[Callable[..., Runner]]
    streams: Sequence[int]

    def make_cases(self) -> Iterator[Case]:
        """Of each format, and of each way to take activations: tokens one by one, a prompt, and streams."""
        for format in self.formats:
            packed = pack_model(self.source.model, FORMATS[format])
            for activations in self.activations:
                yield from self._make_cases(format, take_activations(packed, activations))

    def _make_cases(self, format: str, model: Transformer) -> Iterator[Case]:
        rounds = find_activations(model) == "int8"
        name = f"{self.name} {'int8 x ' if rounds else ''}{format}"
        blocks, head = list_products(model)
        integer = all(map(multiplies_integers, (*blocks, head)))
        size = sum(map(nbytes, (*blocks, head)))
        flops = 2 * sum(weight.size for weight in (*blocks, head))
        tokenizer = self.source.tokenizer
        watch = Watch()
        make = functools.partial(_build_ours, model, tokenizer)
        yield Case(
            name=f"{name} decode",
            nbytes=size,
            flops=flops,
            metric="GB/s",
            integer=integer,
            ours=Runner(name="ours", build=lambda: watch.over(make(1, "write")), times=WRITTEN),
            peers=[make_peer(**_describe("write")) for make_peer in self.alone],
            more=lambda: watch.tell() | {"tokens": 1},
            explain=functools.partial(_explain, size, 1),
        )
        yield Case(
            name=f"{name} prefill {PROMPT}",
            nbytes=size,
            # The logits of one token only.
            flops=2 * (PROMPT * sum(weight.size for weight in blocks) + head.size),
            metric="GFLOP/s",
            integer=integer,
            ours=Runner(name="ours", build=functools.partial(make, 1, "read")),
            peers=[make_peer(**_describe("read")) for make_peer in self.alone],
            more=lambda: {"tokens": PROMPT},
            explain=functools.partial(_explain, size, PROMPT),
        )
        for streams in self.streams:
            yield Case(
                name=f"{name} {streams} streams",
                nbytes=size,
                flops=streams * flops,
                metric="GB/s",
                integer=integer,
                ours=Runner(name="ours", build=functools.partial(make, streams, "write"), times=WRITTEN),
                peers=[make_peer(streams, **_describe("write")) for make_peer in self.together],
                more=functools.partial(dict, tokens=streams),
                explain=functools.partial(_explain, size, streams),
            )


def write_peers(source: ModelSource, folder: Path) -> tuple[list[Callable[..., Runner]], list[Callable[..., Runner]]]:
    """Writes a model for the peers that are installed.

    Returns: what makes a runner of one stream, of each, by the words of `make_llama`; and of many, of those that do
      that, by their number too.
    """
    alone: list[Callable[..., Runner]] = []
    together: list[Callable[..., Runner]] = []
    if find_absent(LLAMA) is None:
        for kind in GGUF_TYPES:
            export_gguf(path := folder / f"{kind}.gguf", source, dtype=kind, dequantize=True)
            alone.append(functools.partial(make_llama, kind, path))
            together.append(alone[-1])
    checkpoint = folder / "checkpoint"
    for packages, convert, make in (
        (ONNX_GENAI, convert_onnx_genai, make_onnx_genai),
        (CTRANSLATE2, convert_ctranslate2, make_ctranslate2),
    ):
        if find_absent(packages) is not None:
            continue
        if not checkpoint.exists():
            export_checkpoint(checkpoint, source, dtype="float32", dequantize=True)
        convert(checkpoint, files := folder / packages[0])
        alone.append(functools.partial(make, files))
    return alone, together


def _describe(work: Work) -> dict[str, Any]:
    """What is done, and how many tokens are read, and written behind them."""
    return (
        {"work": work, "read": PROMPT, "written": 0}
        if work == "read"
        else {"work": work, "read": READ, "written": WRITTEN}
    )


def _build_ours(model: Transformer, tokenizer: Tokenizer, streams: int, work: Work) -> Callable[[], object]:
    context = PROMPT if work == "read" else READ + WRITTEN
    runtime = TracedRuntime(model, GraphConfig(context=context))
    bench = Bench(runtime, tokenizer, rows=streams)
    if work == "read":
        prompt = np.arange(PROMPT, dtype=np.int32) % tokenizer.vocab_size

        def read() -> None:
            bench.read(prompt[:-1])
            bench.write(PROMPT - 1, 1)

        return read
    return lambda: bench.write(READ, WRITTEN)


def _explain(size: int, tokens: int, measured: Sequence[dict[str, Any]]) -> str:
    """Tokens a second of all sides, from the rows of a case whose step makes `tokens`; and what is not in kernels."""
    seconds = 1e-6 * measured[0]["ours"]
    said = [f"  {tokens / seconds:.1f} tokens/s, {size / tokens / 1e6:.1f} MB of weights a token"]
    if "outside_of_kernels" in measured[0]:
        said.append(f"{100 * measured[0]['outside_of_kernels']:.1f}% of the time outside of kernels")
    for row in measured[1:]:
        said.append(f"{row['peer_name']} {tokens * row['peer'] / row['ours'] / seconds:.1f} tokens/s")
    return ", ".join(said)
