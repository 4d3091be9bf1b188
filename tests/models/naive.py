"""The decoder written a second time: numpy, float64, one document, loops where the model has axes.

It shares no code with hsai and knows it only by the names of its weights. What the two agree on is what was meant.

T tokens, D embed, N heads, K kv heads, H head dim, F ffn, V vocabulary.
"""

import math
from collections.abc import Mapping

import numpy as np

from hsai.models import TransformerConfig

Weights = Mapping[str, np.ndarray]


def normalize(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """RMS normalization of one vector."""
    return x / math.sqrt(float(np.mean(x**2)) + eps) * gain


def turn_rates(config: TransformerConfig) -> list[float]:
    """Radians a token of each rotated pair, by the piecewise definition over wavelengths."""
    rates = []
    for pair in range(config.head_dim // 2):
        rate = 1.0 / config.rope.theta ** (2 * pair / config.head_dim)
        scaling = config.rope.scaling
        if scaling is not None and scaling.kind == "linear":
            rate /= scaling.factor
        elif scaling is not None:
            wavelength = 2 * math.pi / rate
            longest_kept = scaling.original_length / scaling.high_freq_factor
            shortest_stretched = scaling.original_length / scaling.low_freq_factor
            if wavelength > shortest_stretched:
                rate /= scaling.factor
            elif wavelength > longest_kept:
                smooth = scaling.original_length / wavelength - scaling.low_freq_factor
                smooth /= scaling.high_freq_factor - scaling.low_freq_factor
                rate = (1 - smooth) * rate / scaling.factor + smooth * rate
        rates.append(rate)
    return rates


def turn(head: np.ndarray, position: int, rates: list[float]) -> np.ndarray:
    """Element i and element i + H/2 are a complex number, turned by position * rate."""
    half = len(head) // 2
    turned = (head[:half] + 1j * head[half:]) * np.exp(1j * position * np.array(rates))
    return np.concatenate([turned.real, turned.imag])


def gate(x: np.ndarray, activation: str) -> np.ndarray:
    """SiLU, or GELU in its tanh form."""
    if activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(config: TransformerConfig, weights: Weights, layer: int, x: np.ndarray) -> np.ndarray:
    """(T, D) -> (T, D), one head and one token at a time."""
    c, width, rates = config, config.head_dim, turn_rates(config)

    def heads(name: str, count: int, gain: str | None) -> list[list[np.ndarray]]:
        rows = (x @ weights[f"layers.attention.{name}"][layer]).reshape(len(x), count, width)
        found = []
        for position, row in enumerate(rows):
            if gain is not None and c.qk_norm:
                row = [normalize(head, weights[f"layers.attention.{gain}.gain"][layer], c.norm_eps) for head in row]
            found.append([turn(head, position, rates) for head in row] if name != "v" else list(row))
        return found

    q, k, v = heads("q", c.heads, "q_norm"), heads("k", c.kv_heads, "k_norm"), heads("v", c.kv_heads, None)
    out = np.zeros((len(x), c.heads * width))
    for t in range(len(x)):
        first = 0 if c.sliding_window is None else max(0, t - c.sliding_window + 1)
        for head in range(c.heads):
            shared = head // (c.heads // c.kv_heads)
            scores = np.array([q[t][head] @ k[s][shared] / math.sqrt(width) for s in range(first, t + 1)])
            chances = np.exp(scores - scores.max())
            chances /= chances.sum()
            mixed = sum(p * v[s][shared] for p, s in zip(chances, range(first, t + 1), strict=True))
            out[t, head * width : (head + 1) * width] = mixed
    return out @ weights["layers.attention.o"][layer]


def logits(config: TransformerConfig, weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """The logits (T, V) of one document (T,)."""
    c = config
    wide = {name: np.asarray(value, np.float64) for name, value in weights.items()}

    def normalize_rows(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return np.stack([normalize(row, gain, c.norm_eps) for row in x])

    x = np.stack([wide["embed"][:, token] for token in tokens])
    for layer in range(c.layers):
        x = x + attend(c, wide, layer, normalize_rows(x, wide["layers.attention_norm.gain"][layer]))
        y = normalize_rows(x, wide["layers.mlp_norm.gain"][layer])
        opened = gate(y @ wide["layers.mlp.gate"][layer], c.activation) * (y @ wide["layers.mlp.up"][layer])
        x = x + opened @ wide["layers.mlp.down"][layer]
    return normalize_rows(x, wide["final_norm.gain"]) @ wide["embed" if c.tie_embeddings else "unembed"]


def loss(config: TransformerConfig, weights: Weights, tokens: np.ndarray, targets: np.ndarray) -> float:
    """The summed -log p of the targets, in nats."""
    rows = logits(config, weights, tokens)
    largest = rows.max(axis=1)
    total = np.log(np.exp(rows - largest[:, None]).sum(axis=1)) + largest
    return float(np.sum(total - rows[np.arange(len(targets)), targets]))
