"""Products of other runtimes on the same shapes: ONNX Runtime's int4 (MatMulNBits) and dynamic int8, if installed.

Dimensions: R rows, D contraction, F outputs.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from bench.timing import Runner
from hsai.machine import count_cores

DOMAIN = "com.microsoft"
GROUP = 64


ONNX = ("onnxruntime", "onnx")
"""Packages that the peers here need."""


def find_absent(packages: Sequence[str]) -> str | None:
    """Why a peer that needs these packages is not there, or None if it is."""
    for name in packages:
        try:
            __import__(name)
        except ImportError as error:
            return f"{name}: {error}"
    return None


def make_int4_peer(rows: int, contraction: int, columns: int, copies: int) -> Runner:
    """MatMulNBits: 4 bits with a float32 scale for each 64 of the contraction, activations rounded to int8."""
    from onnx import helper

    rng = np.random.default_rng(0)
    groups = contraction // GROUP
    nodes, arrays = [], {}
    for i in range(copies):
        arrays[f"w{i}"] = rng.integers(0, 256, (columns, groups, GROUP // 2), np.uint8)
        arrays[f"s{i}"] = rng.uniform(0.01, 0.1, columns * groups).astype(np.float32)
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"w{i}", f"s{i}"],
                [f"y{i}"],
                domain=DOMAIN,
                K=contraction,
                N=columns,
                bits=4,
                block_size=GROUP,
                accuracy_level=4,
            )
        )
    return _make_runner("onnxruntime int4", nodes, arrays, rows, contraction, columns)


def make_int8_peer(rows: int, contraction: int, columns: int, copies: int) -> Runner:
    """DynamicQuantizeMatMul: int8 weights with a scale a column, activations rounded to uint8 as they come."""
    from onnx import helper

    rng = np.random.default_rng(0)
    nodes, arrays = [], {}
    for i in range(copies):
        arrays[f"w{i}"] = rng.integers(-127, 128, (contraction, columns)).astype(np.int8)
        arrays[f"s{i}"] = rng.uniform(0.01, 0.1, columns).astype(np.float32)
        nodes.append(helper.make_node("DynamicQuantizeMatMul", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain=DOMAIN))
    return _make_runner("onnxruntime int8", nodes, arrays, rows, contraction, columns)


def _make_runner(
    name: str, nodes: list, arrays: dict[str, np.ndarray], rows: int, contraction: int, columns: int
) -> Runner:
    """A graph that multiplies one x by all copies of the weight, one after the other."""
    return Runner(
        name=name,
        build=functools.partial(_build_session, nodes, arrays, rows, contraction, columns),
        times=len(nodes),
    )


def _build_session(
    nodes: list, arrays: dict[str, np.ndarray], rows: int, contraction: int, columns: int
) -> Callable[[], object]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (rows, contraction))],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, (rows, columns)) for node in nodes],
        [numpy_helper.from_array(array, key) for key, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count_cores()
    # Threads that spin on after a run would take the cores from whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((rows, contraction)).astype(np.float32)
    return lambda: session.run(None, {"x": x})
