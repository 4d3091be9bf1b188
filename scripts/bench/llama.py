"""A whole model as the yardstick: llama.cpp (PyPI's `llama-cpp-python`, built natively) at TinyLlama-1.1B's shape.

llama.cpp runs all of the model, random weights in its Q4_0 (4.5 bits a weight): products, attention over what was read
so far, norms, rope, the embedding, and a head of 512 words (0.1% of the weights, so that no vocabulary weighs in). Ours
is the chain of the same model's products and nothing else: q, k, v, o, gate, up and down of every layer, one after the
other, in one compiled program. Nothing is subtracted from llama.cpp's time; what of its work the products are, and what
of its time ours take, stands under each case. Its file is written here, by PyPI's `gguf`.

Dimensions: D embed, F ffn, R rows (tokens at once).
"""

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.activations import name_case
from bench.ceilings import find_cache_size
from bench.llama_context import make_llama
from bench.peers import find_absent
from bench.products import DECODE_ROWS, Multiply, chain_products, multiplies_integers, multiply_rounded, multiply_weight
from bench.timing import Case, Runner
from hsai.formats import Int4Config, NMInt4Config, VNMInt4Config, Weight, nbytes

PACKAGES = ("llama_cpp", "gguf")
"""What the peer needs."""

LAYERS, EMBED, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 22, 2048, 5632, 32, 4, 64, 512

PRODUCTS: Mapping[str, tuple[int, int]] = {
    "attn_q": (EMBED, HEADS * HEAD_DIM),
    "attn_k": (EMBED, KV_HEADS * HEAD_DIM),
    "attn_v": (EMBED, KV_HEADS * HEAD_DIM),
    "attn_output": (HEADS * HEAD_DIM, EMBED),
    "ffn_gate": (EMBED, FFN),
    "ffn_up": (EMBED, FFN),
    "ffn_down": (FFN, EMBED),
}
"""GGUF's name -> (D, F), of each layer."""

FORMATS: Mapping[str, Any] = {"int4": Int4Config(), "2:4 int4": NMInt4Config(), "64:2:8 int4": VNMInt4Config()}
"""int4 first: the others take turns with it."""

ACTIVATIONS: Mapping[str, Multiply] = {"": multiply_weight, "int8 x ": multiply_rounded}

WEIGHTS = "q4_0 (whole model)"
"""llama.cpp's."""

INT4 = "our int4"
"""The peer of sparse formats, with activations as theirs."""

BARS: Mapping[str, float] = {"2:4 int4": 1.3, "64:2:8 int4": 2.0}
"""How many times as fast as our int4 a sparse format is to decode, of weights that no cache holds."""

DECODED = 8
"""Tokens that one run decodes, one by one, after as many that were read before."""

CONTEXT = 1024
Q4_0_BLOCK, Q4_0_BYTES = 32, 18
"""Weights of a block, and its bytes: a float16 scale and 4 bits each."""


def make_model(rows: Sequence[int], *, quick: bool) -> Iterator[Case]:
    """A model's products in our formats, and the whole model in llama.cpp where it is installed; quick: of 4 layers.

    Formats of the same work follow one another, and share one int4 that takes turns with each.
    """
    layers = 4 if quick else LAYERS
    flops = 2 * layers * sum(d * f for d, f in PRODUCTS.values())
    draw = np.random.default_rng(0)
    dense = {shape: jnp.asarray(draw.standard_normal(shape, np.float32)) for shape in dict.fromkeys(PRODUCTS.values())}
    with tempfile.TemporaryDirectory(prefix="hsai_bench_") as folder:
        path: Path | None = None
        if find_absent(PACKAGES) is None:
            path = Path(folder) / "model.gguf"
            write_model(path, layers)
        packed = {name: {shape: config.pack(w) for shape, w in dense.items()} for name, config in FORMATS.items()}
        for (before, multiply), count in itertools.product(list(ACTIVATIONS.items())[: 1 if quick else 2], rows):
            others: list[Runner] = [] if path is None else [_make_llama(path, count)]
            int4 = Runner(name=INT4, build=functools.partial(_build_chain, packed["int4"], layers, multiply, count))
            for name, weights in packed.items():
                ours = functools.partial(_build_chain, weights, layers, multiply, count)
                size = layers * sum(nbytes(weights[shape]) for shape in PRODUCTS.values())
                bar = BARS.get(name) if count <= DECODE_ROWS and size > find_cache_size() else None
                yield Case(
                    name=name_case(f"model {before}{name}, {layers} layers, {count} token{'s' if count > 1 else ''}"),
                    nbytes=size,
                    flops=count * flops,
                    metric="GB/s" if count <= DECODE_ROWS else "GFLOP/s",
                    integer=all(map(multiplies_integers, weights.values())),
                    ours=Runner(name="ours", build=ours),
                    peers=others if name == "int4" else [int4, *others],
                    explain=functools.partial(_explain, layers, count, bar),
                )


def _build_chain(
    packed: Mapping[tuple[int, int], Weight], layers: int, multiply: Multiply, rows: int
) -> Callable[[], object]:
    # Every layer has its own copy, or the cache would serve it.
    shapes = [shape for _ in range(layers) for shape in PRODUCTS.values()]
    weights = [jax.tree.map(lambda leaf: leaf.copy(), packed[shape]) for shape in shapes]
    return chain_products(rows, weights, multiply)


def _make_llama(path: Path, rows: int) -> Runner:
    """Reads `rows` tokens at once; or, of one, decodes DECODED one by one behind as many."""
    if rows > 1:
        return make_llama(WEIGHTS, path, work="read", read=rows, written=0)
    return make_llama(WEIGHTS, path, work="write", read=DECODED, written=DECODED)


def _explain(layers: int, rows: int, bar: float | None, measured: Sequence[dict[str, Any]]) -> str:
    """What is asked of a sparse format beside our int4, and llama.cpp's own rates, from the rows of a case."""
    by_peer = {row["peer_name"]: row for row in measured}
    asked = ""
    if bar is not None:
        ratio = by_peer[INT4]["ratio"]
        met = "met" if ratio >= bar else "not met"
        asked = f"  {ratio:.2f} times as fast as our int4: {bar} is asked for, and {met}\n"
    if f"llama.cpp {WEIGHTS}" not in by_peer:
        return f"{asked}  llama.cpp is absent: ours are the model's products alone"
    time_row, peer = measured[0], by_peer[f"llama.cpp {WEIGHTS}"]
    seconds = 1e-6 * time_row["ours"] * peer["ours"] / peer["peer"]
    weights = layers * sum(d * f for d, f in PRODUCTS.values())
    head = EMBED * VOCAB
    # Decoding sees the prompt and half of what follows; a prompt, half of itself.
    seen = 1.5 * DECODED if rows == 1 else rows / 2
    attention = 4 * layers * HEADS * HEAD_DIM * seen
    share = weights / (weights + head / rows + attention / 2)
    # The head reads its weight once, and makes logits of one token.
    size = (weights + head) * Q4_0_BYTES / Q4_0_BLOCK
    return asked + (
        f"  llama.cpp, all counted: {rows / seconds:.1f} tokens/s, {size / seconds / 1e9:.2f} GB/s of its weights, "
        f"{2 * (rows * weights + head) / seconds / 1e9:.1f} GFLOP/s; the products are {100 * share:.1f}% of its "
        f"multiplications, ours take {100 / peer['ratio']:.1f}% of its time"
    )


def write_model(path: Path, layers: int) -> None:
    """Writes a GGUF of the llama architecture random weights, and no tokenizer: tokens are ids."""
    import gguf

    rng = np.random.default_rng(0)

    def draw(contraction: int, columns: int) -> np.ndarray:
        """uint8 (F, bytes of D weights): codes as they fall, and a scale that keeps the size of activations."""
        blocks = rng.integers(0, 256, (columns, contraction // Q4_0_BLOCK, Q4_0_BYTES), np.uint8)
        scale = np.float16(contraction**-0.5 / 4.6)  # codes of -8 to 7 have a deviation of 4.6
        blocks[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        return blocks.reshape(columns, -1)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBED)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    kind = gguf.GGMLQuantizationType.Q4_0
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", draw(EMBED, VOCAB), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(EMBED, np.float32))
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(EMBED, np.float32))
        for name, shape in PRODUCTS.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", draw(*shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
