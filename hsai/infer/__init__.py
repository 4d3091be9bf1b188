"""Runs a bundle on one device: `Engine.load(directory).generate("def main(")`.

A prompt flows through `engine.py` (prefill bucket by bucket, then decode token by token), over the programs of
`runtime.py` (traced here, or shipped in the bundle); `sampling.py` chooses each token, `streaming.py` makes them text.
"""

from hsai.infer.engine import Engine, Generation
from hsai.infer.runtime import Runtime, load_runtime, trace_runtime
from hsai.infer.sampling import SamplingConfig

__all__ = ["Engine", "Generation", "Runtime", "SamplingConfig", "load_runtime", "trace_runtime"]
