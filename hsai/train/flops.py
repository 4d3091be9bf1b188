"""How much arithmetic a training token costs, and how much a chip can do: the two halves of model flops utilization.

D embed, N heads, K kv heads, H head dim, F ffn, V vocabulary, L layers, T sequence length.
"""

import math

import jax

from hsai.models.transformer import TransformerConfig, abstract_transformer


def parameter_count(config: TransformerConfig) -> int:
    """The number of trained weights, norm gains included; a tied table counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_transformer(config)))


def matmul_parameter_count(config: TransformerConfig) -> int:
    """The weights that a token is multiplied by: blocks and output projection.

    Norm gains are not matrices, and the embedding is looked up; a tied table counts once, for the output projection.
    Of several experts those count that a token goes to, and the router.
    """
    c = config
    attention = 2 * c.embed * c.heads * c.head_dim + 2 * c.embed * c.kv_heads * c.head_dim
    mlp = 3 * c.embed * c.mlp
    if c.moe is not None:
        mlp = c.moe.active * mlp + c.embed * c.moe.experts
    return c.layers * (attention + mlp) + c.embed * c.vocab


def flops_per_token(config: TransformerConfig, sequence_length: int) -> float:
    """Floating-point operations to train on one token, forward and backward.

    The convention is that of PaLM (2204.02311, appendix B): 6 for each weight of a matrix product (2 forward, 4
    backward), and 12 * L * N * H * T for queries against keys and weights against values. It counts what the model
    needs and not what the program does: recomputed activations are left out. Causality is not credited (every query
    is charged for all T keys), so that utilizations compare with published ones; a sliding window is, because its
    models are trained far beyond it: T is then at most the window.
    """
    c = config
    window = sequence_length if c.sliding_window is None else min(sequence_length, c.sliding_window)
    keys = sum(sequence_length if c.is_global(layer) else window for layer in range(c.layers))
    return 6.0 * matmul_parameter_count(c) + 12.0 * c.heads * c.head_dim * keys


# Dense bfloat16 peak of one jax device, in flop/s, by `device_kind`. Matched exactly: a slice of a GPU (MIG) or a
# variant that is not listed has another peak, and no utilization is better than a wrong one.
# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "Peak compute per chip". NVIDIA: the product's datasheet;
# where it states bfloat16 with sparsity only, half of that.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p, under the name that its runtime reports
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e, Trillium
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # Ironwood; jax sees each of a chip's two TensorCores as a device
    "NVIDIA A10": 125e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 242e12 / 2,
    "NVIDIA L40S": 733e12 / 2,
    "NVIDIA H100 80GB HBM3": 1979e12 / 2,  # SXM5
    "NVIDIA H100 PCIe": 1513e12 / 2,
    "NVIDIA H100 NVL": 1671e12 / 2,
    "NVIDIA GH200 480GB": 1979e12 / 2,
    "NVIDIA H200": 1979e12 / 2,  # SXM5
    "NVIDIA H200 NVL": 1671e12 / 2,
    "NVIDIA B200": 4500e12 / 2,  # HGX: 36 petaflop/s with sparsity for 8
    "NVIDIA GB200": 5000e12 / 2,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 flop/s of one device at its highest; None for a chip that is not listed, and for any CPU."""
    return PEAK_FLOPS.get(device.device_kind)
