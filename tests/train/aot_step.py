"""Compiles a training step for 8 chips of a TPU v5e that are not there, with kernels and without: a row of JSON each.

Run by test_aot_step.py, in a process that has libtpu on its path.
"""

import json

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from hsai.data.packing import Batch
from hsai.models import TransformerConfig
from hsai.sharding import MeshConfig, array_sharding, make_mesh, tree_shardings, use_mesh
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig, make_optimizer
from hsai.train.state import build_state
from hsai.train.step import make_train_step
from hsai_kernels.dispatch import compile_for, prefer

# More kv heads than devices of a tensor-parallel group, and rows long enough for several blocks of attention.
MODEL = TransformerConfig(vocab=4096, embed=256, layers=2, heads=8, kv_heads=4, head_dim=64, mlp=1024, max_length=2048)
ROWS, LENGTH = 8, 1024


def compile_step(mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """For the backends that are chosen in this context."""
    optimizer = make_optimizer(OptimizerConfig(), 100)
    state = jax.eval_shape(lambda: build_state(MODEL, optimizer, 0))
    shardings = tree_shardings(state, mesh)
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    rows = array_sharding(mesh, ("batch", "seq"), (ROWS, LENGTH))
    ids, weights = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(tokens=ids, targets=ids, segments=ids, positions=ids, weights=weights)
    step = make_train_step(optimizer, lambda step: 1e-3, TrainConfig(remat="full"), shardings)
    return step.lower(placed, batch).compile()


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2), devices)
    with compile_for("tpu"), use_mesh(mesh):
        programs = {"kernels": compile_step(mesh)}
        with prefer("chunked"):
            programs["chunked"] = compile_step(mesh)
    names = ("attention_forward", "attention_backward_queries", "attention_backward_keys", "cross_entropy_backward")
    for name, program in programs.items():
        calls = [line for line in program.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
        memory = program.memory_analysis()
        row = {
            "program": name,
            "calls": {kernel: sum(kernel in call for call in calls) for kernel in names},
            "peak_bytes": memory.peak_memory_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
