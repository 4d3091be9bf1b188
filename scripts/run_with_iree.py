#!/usr/bin/env python
"""A bundle without jax: IREE compiles its StableHLO graphs, and greedy text comes out of its safetensors.

    pip install iree-base-compiler iree-base-runtime numpy safetensors tokenizers ml_dtypes
    python scripts/run_with_iree.py BUNDLE "def main():" [TOKENS]

All that a deployer has to know stands in manifest.json: what each graph takes and gives, in order.
"""

import json
import sys
from pathlib import Path

import iree.compiler
import iree.runtime as rt
import numpy as np
import safetensors
from ml_dtypes import bfloat16
from tokenizers import Tokenizer

KINDS = {"float32": "FLOAT_32", "bfloat16": "BFLOAT_16", "int8": "SINT_8", "int32": "SINT_32", "uint8": "UINT_8"}
KINDS |= {"uint16": "UINT_16", "uint32": "UINT_32"}
CPU = "--iree-hal-local-target-device-backends=llvm-cpu", "--iree-llvmcpu-target-cpu=host"
FLAGS = ["--iree-hal-target-device=local", *CPU]
CONFIG = rt.Config("local-task")


def place(array: np.ndarray) -> rt.HalBufferView:
    """Copies an array to the device."""
    element = getattr(rt.HalElementType, KINDS[str(array.dtype)])
    raw = array.view(np.uint16) if array.dtype == bfloat16 else array  # numpy's buffers know no bfloat16
    where = rt.MemoryType.DEVICE_LOCAL, rt.BufferUsage.DEFAULT, CONFIG.device
    return CONFIG.device.allocator.allocate_buffer_copy(*where, np.ascontiguousarray(raw), element)


def compile_graph(path: Path) -> rt.FunctionInvoker:
    """The function of a StableHLO module, compiled for this machine's CPU."""
    code = iree.compiler.compile_file(str(path), input_type="stablehlo", extra_args=FLAGS)
    module = rt.VmModule.copy_buffer(CONFIG.vm_instance, code)
    context = rt.VmContext(CONFIG.vm_instance, [*CONFIG.default_vm_modules, module])
    return rt.FunctionInvoker(context, CONFIG.device, module.lookup_function("main"))


def main(directory: Path, prompt: str, count: int) -> None:
    """Prints the prompt with its greedy continuation, and the new tokens."""
    manifest = json.loads((directory / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(directory / manifest["tokenizer"]["file"]))
    prefix = map(tokenizer.token_to_id, manifest["tokenizer"]["prefix"])
    ids = [*prefix, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    prefill = max((g for g in manifest["graphs"] if g["step"] == "prefill"), key=lambda graph: graph["tokens"])
    decode = next(g for g in manifest["graphs"] if g["step"] == "decode")
    if len(ids) + count - 1 > decode["slots"]:  # the last new token is not read
        print(f"run_with_iree.py: {len(ids)} + {count} tokens exceed a context of {decode['slots']}", file=sys.stderr)
        sys.exit(2)
    programs = {graph["name"]: compile_graph(directory / graph["stablehlo_file"]) for graph in (prefill, decode)}
    state = {array["name"]: place(np.zeros(array["shape"], array["dtype"])) for array in decode["inputs"]}
    with safetensors.safe_open(directory / "weights.safetensors", "np") as file:
        state |= {name: place(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (it is no mapping)

    def step(graph: dict, tokens: list[int]) -> int:
        """Reads tokens, as many as the graph takes or fewer, and returns the likeliest next one."""
        padded = np.array([tokens + [0] * (graph["tokens"] - len(tokens))], np.int32)
        state.update(tokens=place(padded), count=place(np.array([len(tokens)], np.int32)))
        results = programs[graph["name"]](*[state[array["name"]] for array in graph["inputs"]])
        state.update(zip([array["name"] for array in graph["outputs"]], results, strict=True))
        return int(np.argmax(state["logits"].to_host()[0, : tokenizer.get_vocab_size()]))  # models may have more

    made = [step(prefill, ids[at : at + prefill["tokens"]]) for at in range(0, len(ids), prefill["tokens"])][-1:]
    while len(made) < count:
        made.append(step(decode, made[-1:]))
    print(prompt + tokenizer.decode(made), " ".join(map(str, made)), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 16)
