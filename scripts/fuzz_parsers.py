#!/usr/bin/env python3
"""Throws damaged GGUF and safetensors files at their parsers: each is read, or refused in one line, at once.

    python scripts/fuzz_parsers.py --seconds 600 --seed 0 --keep /tmp/found

Any other exception, a refusal of more than one line, more than a second, or memory out of proportion is a finding: it
is printed, the file is kept, and the exit status is 1. Interesting ones become cases of tests/interop.
"""

import argparse
import random
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from safetensors.numpy import save_file

from hsai.errors import InputError
from hsai.interop.gguf_config import read_config
from hsai.interop.gguf_container import open_gguf
from hsai.interop.gguf_tokenizer import read_tokenizer
from hsai.interop.safetensors_file import read_records

SECONDS = 1.0
BYTES = 64 << 20
"""The seeds are small; no parser has a use for this much."""
EDGES = [0, 1, 2, 7, 8, 31, 32, 255, 256, 1 << 15, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 62, 1 << 63]


def make_gguf(path: Path) -> None:
    """A language model, as far as its header goes, with tensors of every type that is read."""
    writer = GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1, "context_length": 8, "embedding_length": 256, "feed_forward_length": 2,
        "attention.head_count": 1, "attention.head_count_kv": 1, "attention.key_length": 2, "attention.value_length": 2,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("llama.rope.scaling.type", "none")
    tokens = ["<eos>", "a", "b", "ab"]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1, 1])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    tensors = {
        "token_embd": ("Q8_0", 4, 256), "blk.0.attn_norm": ("F32", 256), "blk.0.attn_q": ("Q4_K", 2, 256),
        "blk.0.attn_k": ("Q4_0", 2, 256), "blk.0.attn_v": ("Q4_1", 2, 256), "blk.0.attn_output": ("BF16", 256, 2),
        "blk.0.ffn_norm": ("F32", 256), "blk.0.ffn_gate": ("Q5_0", 2, 256), "blk.0.ffn_up": ("Q6_K", 2, 256),
        "blk.0.ffn_down": ("F16", 256, 2), "output_norm": ("F32", 256),
    }  # fmt: skip
    for name, (kind, *shape) in tensors.items():
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        stored = np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> None:
    """Header, every tensor, config, tokenizer."""
    file = open_gguf(path)
    for name in file.tensors:
        file.read(name)
    vocab = next(iter(file.tensors.values())).shape[0] if file.tensors else 1
    read_config(file.metadata, vocab=vocab, tied=True)
    read_tokenizer(file.metadata, vocab)


def make_safetensors(path: Path) -> None:
    """Three tensors of different types."""
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16), "c": np.ones((1, 1, 2), np.float64)}
    save_file(arrays, path)


def read_safetensors(path: Path) -> None:
    """Header and every tensor."""
    for record in read_records(path).values():
        record.read()


PARSERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "gguf": (make_gguf, read_gguf),
    "safetensors": (make_safetensors, read_safetensors),
}


def damage(content: bytes, header: int, rng: random.Random) -> bytes:
    """One to four changes, most of them within the first `header` bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        end = max(1, min(header, len(data)) if rng.random() < 0.9 else len(data))
        at = rng.randrange(end)
        match rng.randrange(8):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randint(1, 16)]
            case 4:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            case 5:
                form = rng.choice("<I <Q".split())
                width = struct.calcsize(form)
                value = (rng.choice(EDGES) + rng.choice([-1, 0, 0, 1])) % (1 << 8 * width)
                data[at : at + width] = struct.pack(form, value)
            case 6:
                other = rng.randrange(end)
                data[at : at + 8] = data[other : other + 8]
            case 7:
                digits = [index for index in range(end) if chr(data[index]).isdigit()]
                if digits:
                    data[rng.choice(digits)] = rng.choice(b"0123456789-")
        if not data:
            break
    return bytes(data)


def find_fault(read: Callable[[Path], None], path: Path) -> str | None:
    """What is wrong with how a file was read or refused; None if nothing."""
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        read(path)
    except InputError as error:
        if "\n" in str(error):
            return f"a refusal of several lines: {error!r}"
    except Exception:
        return traceback.format_exc()
    finally:
        seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    if peak > BYTES:
        return f"{peak} bytes"
    return f"{seconds:.1f} s" if seconds > SECONDS else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each parser (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: 0)")
    parser.add_argument("--parser", choices=tuple(PARSERS), nargs="+", default=list(PARSERS), help="default: all")
    parser.add_argument("--keep", type=Path, help="directory for files that are findings")
    arguments = parser.parse_args()
    findings = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.parser:
            make, read = PARSERS[name]
            path = Path(scratch) / f"seed.{name}"
            make(path)
            read(path)
            content, rng, cases = path.read_bytes(), random.Random(arguments.seed), 0
            end = time.monotonic() + arguments.seconds
            while time.monotonic() < end:
                data = damage(content, 2048, rng)
                path.write_bytes(data)
                cases += 1
                if (fault := find_fault(read, path)) is not None:
                    findings += 1
                    print(f"{name} case {cases}: {fault}", flush=True)
                    if arguments.keep is not None:
                        arguments.keep.mkdir(parents=True, exist_ok=True)
                        (arguments.keep / f"{arguments.seed}-{cases}.{name}").write_bytes(data)
            print(f"{name}: {cases} files", flush=True)
    print(f"{findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
