"""Host memory stays near one tensor: next to what the devices hold, and next to nothing where a bundle is written."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import json, os, sys, tracemalloc
from pathlib import Path
several = len(sys.argv) > 2  # processes of one device each
os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"] = "cpu", "1" if several else "2"
import jax, numpy as np
if several:
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from hsai.cli import main
from hsai.data.tokenizer import Tokenizer
from hsai.export.bundle import write_bundle
from hsai.export.source import open_foreign
from hsai.formats.storage import named_arrays, named_weights
from hsai.interop.assemble import assemble
from hsai.interop.huggingface import open_checkpoint
from hsai.interop.huggingface_config import write_config
from hsai.interop.safetensors_file import write_tensors
from hsai.models import TransformerConfig
from hsai.models.transformer import abstract_transformer
from hsai.sharding import MeshConfig, make_mesh, tree_shardings

config = TransformerConfig(
    vocab=1000, embed=768, layers=12, heads=12, kv_heads=12, head_dim=64, mlp=2048, max_length=64, dtype="float32"
)
directory = Path(sys.argv[1])
directory.mkdir(exist_ok=True)
family, raw = write_config(config)
leaves = {name: param.get_value().shape for name, param in named_weights(abstract_transformer(config)).items()}
shapes = {e.name: (e.shape(leaves[e.leaf]), np.dtype(np.float32)) for e in family.make_entries(config)}
draw = np.random.default_rng(0)
tensors = ((name, draw.random(shape, np.float32)) for name, (shape, _) in shapes.items())
write_tensors(directory / "model.safetensors", shapes, tensors)
tokenizer = Tokenizer.train(["def main(): return 'hello world'\\n" * 3], 270)
tokenizer.save(directory / "tokenizer.json")
(directory / "config.json").write_text(json.dumps(raw | {"eos_token_id": tokenizer.eot}))
sizes = [4 * int(np.prod(shape)) for shape, _ in shapes.values()]

def peak():
    # Of this program alone: ru_maxrss would begin with what the parent held when it made this process.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
"""

READ = """
shardings = tree_shardings(abstract_transformer(config), make_mesh(MeshConfig(data=1, model=2)))
checkpoint = open_checkpoint(directory)
before = peak()
tracemalloc.start()
model = assemble(checkpoint, shardings)
_, arrays = tracemalloc.get_traced_memory()
tracemalloc.stop()
streamed = peak() - before
split = [array for array in named_arrays(model).values() if not array.sharding.is_fully_replicated]
if several:
    print(json.dumps({"model": sum(sizes), "largest": max(sizes), "streamed": streamed, "split": len(split)}))
    sys.exit()
del model
held = {name: record.read() for name, record in checkpoint.tensors.items()}

class Hoard(type(checkpoint)):  # the same work, with all tensors at hand
    def read(self, entry):
        return held[entry.name]

model = assemble(Hoard(**vars(checkpoint)), shardings)
print(json.dumps({"model": sum(sizes), "largest": max(sizes), "arrays": arrays, "streamed": streamed,
                  "hoarded": peak() - before, "split": len(split)}))
"""

IMPORT = """
source = open_foreign(directory)  # and all that this takes besides
before = peak()
assert main(["import", str(directory), str(directory / "bundle")]) == 0
streamed = peak() - before
write_bundle(directory / "held", assemble(source.checkpoint), source.tokenizer)  # the same, with the model in between
print(json.dumps({"model": sum(sizes), "largest": max(sizes), "streamed": streamed, "held": peak() - before}))
"""


def start(script: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SETUP + script, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, int]:
    said, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    sizes: dict[str, int] = json.loads(said.splitlines()[-1])
    assert sizes["model"] > 300e6 > 40 * sizes["largest"]
    return sizes


@pytest.mark.slow
def test_an_import_to_a_bundle_holds_a_few_tensors(tmp_path: Path) -> None:
    sizes = finish(start(IMPORT, tmp_path))
    assert sizes["streamed"] < 8 * sizes["largest"], sizes
    assert sizes["held"] > 0.9 * sizes["model"], sizes  # which this test would notice


@pytest.mark.slow
def test_a_streamed_import_holds_about_one_tensor(tmp_path: Path) -> None:
    """340 MB on two devices of one process, whose memory is the host's: all of the model, and little else."""
    sizes = finish(start(READ, tmp_path))
    assert sizes["split"] >= 7
    # Of numpy: the tensor, the devices' parts of it and, until the runtime lets go of them, those of the one before.
    assert sizes["arrays"] < 5 * sizes["largest"]
    assert sizes["model"] < sizes["streamed"] < 1.3 * sizes["model"], sizes
    assert sizes["hoarded"] > 1.9 * sizes["model"], sizes  # which this test would notice


@pytest.mark.slow
def test_each_of_two_workers_holds_its_half(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = [start(READ, tmp_path / str(index), place, index) for index in range(2)]
    try:
        for sizes in map(finish, workers):
            assert sizes["split"] >= 7
            # Beside its half, as much as one process needs beside the whole: programs, above all.
            assert 0.5 * sizes["model"] < sizes["streamed"] < 0.8 * sizes["model"], sizes
    finally:
        for worker in workers:
            worker.kill()
