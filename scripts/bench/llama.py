"""A whole model as the yardstick: llama.cpp (PyPI's `llama-cpp-python`, built natively) at TinyLlama-1.1B's shape.

llama.cpp runs all of the model, random weights in its Q4_0 (4.5 bits a weight): products, attention over what was read
so far, norms, rope, the embedding, and a head of 512 words (0.1% of the weights, so that no vocabulary weighs in). Ours
is the chain of the same model's products and nothing else: q, k, v, o, gate, up and down of every layer, one after the
other, in one compiled program. Nothing is subtracted from llama.cpp's time; what of its work the products are, and what
of its time ours take, stands under each case. Its file is written here, by PyPI's `gguf`.

Dimensions: D embed, F ffn, R rows (tokens at once).
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import DECODE_ROWS, Multiply, chain_products, multiplies_integers, multiply_rounded, multiply_weight
from bench.peers import find_absent
from bench.timing import Case, Runner
from hsai.formats import Int4Config, NMInt4Config, VNMInt4Config, Weight, nbytes
from hsai.machine import count_cores

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

FORMATS: tuple[tuple[str, Any, Multiply], ...] = (
    ("int4", Int4Config(), multiply_weight),
    ("int8 x int4", Int4Config(), multiply_rounded),
    ("2:4 int4", NMInt4Config(), multiply_weight),
    ("int8 x 2:4 int4", NMInt4Config(), multiply_rounded),
    ("64:2:8 int4", VNMInt4Config(), multiply_weight),
    ("int8 x 64:2:8 int4", VNMInt4Config(), multiply_rounded),
)

DECODED = 8
"""Tokens that one run decodes, one by one, after as many that were read before."""

CONTEXT = 512
Q4_0_BLOCK, Q4_0_BYTES = 32, 18
"""Weights of a block, and its bytes: a float16 scale and 4 bits each."""


def make_model(rows: Sequence[int], *, quick: bool) -> Iterator[Case]:
    """A model's products in our formats, and the whole model in llama.cpp where it is installed; quick: of 4 layers."""
    layers = 4 if quick else LAYERS
    flops = 2 * layers * sum(d * f for d, f in PRODUCTS.values())
    draw = np.random.default_rng(0)
    dense = {shape: jnp.asarray(draw.standard_normal(shape, np.float32)) for shape in dict.fromkeys(PRODUCTS.values())}
    with tempfile.TemporaryDirectory(prefix="hsai_bench_") as folder:
        load: Callable[[], Any] | None = None
        if find_absent(PACKAGES) is None:
            load = functools.cache(functools.partial(_load_model, Path(folder) / "model.gguf", layers))
        for name, config, multiply in FORMATS[:1] if quick else FORMATS:
            packed = {shape: config.pack(w) for shape, w in dense.items()}
            size = layers * sum(nbytes(packed[shape]) for shape in PRODUCTS.values())
            for count in rows:
                yield Case(
                    name=f"model {name}, {layers} layers, {count} token{'s' if count > 1 else ''}",
                    nbytes=size,
                    flops=count * flops,
                    metric="GB/s" if count <= DECODE_ROWS else "GFLOP/s",
                    integer=all(map(multiplies_integers, packed.values())),
                    ours=Runner(name="ours", build=functools.partial(_build_chain, packed, layers, multiply, count)),
                    peers=[] if load is None else [_make_llama(load, count)],
                    explain=functools.partial(_explain, layers, count),
                )


def _build_chain(
    packed: Mapping[tuple[int, int], Weight], layers: int, multiply: Multiply, rows: int
) -> Callable[[], object]:
    # Every layer has its own copy, or the cache would serve it.
    shapes = [shape for _ in range(layers) for shape in PRODUCTS.values()]
    weights = [jax.tree.map(lambda leaf: leaf.copy(), packed[shape]) for shape in shapes]
    return chain_products(rows, weights, multiply)


def _make_llama(load: Callable[[], Any], rows: int) -> Runner:
    """Reads `rows` tokens at once; or, of one, decodes DECODED one by one."""

    def build() -> Callable[[], object]:
        model = load()
        tokens = np.random.default_rng(0).integers(0, VOCAB, CONTEXT).tolist()

        def prefill() -> None:
            model.reset()
            model.eval(tokens[:rows])

        def decode() -> None:
            # What was decoded in the run before is forgotten: each sees the same few tokens before it.
            model.n_tokens = DECODED
            for token in tokens[:DECODED]:
                model.eval([token])

        if rows > 1:
            return prefill
        model.reset()
        model.eval(tokens[:DECODED])
        return decode

    return Runner(name="llama.cpp q4_0 (whole model)", build=build, times=1 if rows > 1 else DECODED)


def _explain(layers: int, rows: int, measured: Sequence[dict[str, Any]]) -> str:
    """llama.cpp's own rates, by its bytes and all its products, from the rows of a case that has it."""
    time_row, *peers = measured
    if not peers:
        return "  llama.cpp is absent: ours are the model's products alone"
    seconds = 1e-6 * time_row["ours"] * peers[0]["ours"] / peers[0]["peer"]
    weights = layers * sum(d * f for d, f in PRODUCTS.values())
    head = EMBED * VOCAB
    # Decoding sees the prompt and half of what follows; a prompt, half of itself.
    seen = 1.5 * DECODED if rows == 1 else rows / 2
    attention = 4 * layers * HEADS * HEAD_DIM * seen
    share = weights / (weights + head / rows + attention / 2)
    # The head reads its weight once, and makes logits of one token.
    size = (weights + head) * Q4_0_BYTES / Q4_0_BLOCK
    return (
        f"  llama.cpp, all counted: {rows / seconds:.1f} tokens/s, {size / seconds / 1e9:.2f} GB/s of its weights, "
        f"{2 * (rows * weights + head) / seconds / 1e9:.1f} GFLOP/s; the products are {100 * share:.1f}% of its "
        f"multiplications, ours take {100 / peers[0]['ratio']:.1f}% of its time"
    )


def _load_model(path: Path, layers: int) -> Any:
    from llama_cpp import Llama

    write_model(path, layers)
    return Llama(
        model_path=str(path),
        n_ctx=2 * CONTEXT,
        n_batch=CONTEXT,
        n_ubatch=CONTEXT,
        n_threads=count_cores(),
        n_threads_batch=count_cores(),
        n_gpu_layers=0,
        verbose=False,
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
    writer.add_context_length(2 * CONTEXT)
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
