"""The decoder written a second time: numpy, float64, one document, loops where the model has axes.

It shares no code with hsai and knows it only by the names of its weights. What the two agree on is what was meant.

T tokens, D embed, N heads, K kv heads, H head dim, F ffn, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from hsai.models import TransformerConfig

Weights = Mapping[str, np.ndarray]


def normalize(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """RMS normalization of one vector."""
    return x / math.sqrt(float(np.mean(x**2)) + eps) * gain


def sees_all(config: TransformerConfig, layer: int) -> bool:
    """Whether a layer has no window: none has one, or it is the last of its group."""
    group = config.global_every
    return config.sliding_window is None or (group is not None and layer % group == group - 1)


def turn_rates(config: TransformerConfig, layer: int) -> list[float]:
    """Radians a token of each rotated pair, by the piecewise definition over wavelengths."""
    rates = []
    rope = config.rope if config.local_rope is None or sees_all(config, layer) else config.local_rope
    for pair in range(config.head_dim // 2):
        rate = 1.0 / rope.theta ** (2 * pair / config.head_dim)
        scaling = rope.scaling
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


def widen(config: TransformerConfig, gain: np.ndarray) -> np.ndarray:
    """What a stored gain multiplies by."""
    return 1 + gain if config.norm_plus_one else gain


def rate(weights: Weights, layer: int, row: np.ndarray) -> np.ndarray:
    """The probability of each expert for one token."""
    scores = row @ weights["layers.mlp.router"][layer]
    chances = np.exp(scores - scores.max())
    return chances / chances.sum()


def choose(config: TransformerConfig, chances: np.ndarray) -> list[int]:
    """A token's experts."""
    return sorted(range(config.moe.experts), key=lambda e: -chances[e])[: config.moe.active]


def feed(config: TransformerConfig, weights: Weights, layer: int, x: np.ndarray) -> np.ndarray:
    """(T, D) -> (T, D): the feed-forward block, or the experts of one token after the other."""
    gates, ups, downs = (weights[f"layers.mlp.{name}"][layer] for name in ("gate", "up", "down"))
    if config.moe is None:
        return (gate(x @ gates, config.activation) * (x @ ups)) @ downs
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        chances = rate(weights, layer, row)
        best = choose(config, chances)
        total = sum(chances[e] for e in best) if config.moe.normalize else 1.0
        for e in best:
            out[t] += chances[e] / total * ((gate(row @ gates[e], config.activation) * (row @ ups[e])) @ downs[e])
    return out


def attend(config: TransformerConfig, weights: Weights, layer: int, x: np.ndarray) -> np.ndarray:
    """(T, D) -> (T, D), one head and one token at a time."""
    c, width, rates = config, config.head_dim, turn_rates(config, layer)
    softness = math.sqrt(width if c.query_scalar is None else c.query_scalar)

    def heads(name: str, count: int, gain: str | None) -> list[list[np.ndarray]]:
        flat = x @ weights[f"layers.attention.{name}"][layer]
        if c.qkv_bias:
            flat = flat + weights[f"layers.attention.{name}_bias"][layer]
        rows = flat.reshape(len(x), count, width)
        found = []
        for position, row in enumerate(rows):
            if gain is not None and c.qk_norm:
                row = [
                    normalize(head, widen(c, weights[f"layers.attention.{gain}.gain"][layer]), c.norm_eps)
                    for head in row
                ]
            found.append([turn(head, position, rates) for head in row] if name != "v" else list(row))
        return found

    q, k, v = heads("q", c.heads, "q_norm"), heads("k", c.kv_heads, "k_norm"), heads("v", c.kv_heads, None)
    out = np.zeros((len(x), c.heads * width))
    for t in range(len(x)):
        first = 0 if sees_all(c, layer) else max(0, t - c.sliding_window + 1)
        for head in range(c.heads):
            shared = head // (c.heads // c.kv_heads)
            scores = np.array([q[t][head] @ k[s][shared] / softness for s in range(first, t + 1)])
            chances = np.exp(scores - scores.max())
            chances /= chances.sum()
            mixed = sum(p * v[s][shared] for p, s in zip(chances, range(first, t + 1), strict=True))
            out[t, head * width : (head + 1) * width] = mixed
    return out @ weights["layers.attention.o"][layer]


def logits(
    config: TransformerConfig,
    weights: Weights,
    tokens: np.ndarray,
    watch: Callable[[int, np.ndarray], None] = lambda layer, x: None,
) -> np.ndarray:
    """The logits (T, V) of one document (T,); `watch` sees what each layer's feed-forward block reads."""
    c = config
    wide = {name: np.asarray(value, np.float64) for name, value in weights.items()}

    def normalize_rows(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return np.stack([normalize(row, widen(c, gain), c.norm_eps) for row in x])

    x = np.stack([wide["embed"][:, token] for token in tokens])
    if c.scale_embeddings:
        x = x * math.sqrt(c.embed)
    for layer in range(c.layers):
        y = attend(c, wide, layer, normalize_rows(x, wide["layers.attention_norm.gain"][layer]))
        x = x + (normalize_rows(y, wide["layers.attention_post_norm.gain"][layer]) if c.post_norm else y)
        normed = normalize_rows(x, wide["layers.mlp_norm.gain"][layer])
        watch(layer, normed)
        y = feed(c, wide, layer, normed)
        x = x + (normalize_rows(y, wide["layers.mlp_post_norm.gain"][layer]) if c.post_norm else y)
    return normalize_rows(x, wide["final_norm.gain"]) @ wide["embed" if c.tie_embeddings else "unembed"]


def loss(config: TransformerConfig, weights: Weights, tokens: np.ndarray, targets: np.ndarray) -> float:
    """The summed -log p of the targets, in nats."""
    rows = logits(config, weights, tokens)
    largest = rows.max(axis=1)
    total = np.log(np.exp(rows - largest[:, None]).sum(axis=1)) + largest
    return float(np.sum(total - rows[np.arange(len(targets)), targets]))


def imbalance(config: TransformerConfig, weights: Weights, tokens: np.ndarray, counted: np.ndarray) -> float:
    """The sum over layers of E * sum over experts of share of the choices * mean probability, of `counted` tokens."""
    experts, total = config.moe.experts, 0.0

    def watch(layer: int, x: np.ndarray) -> None:
        nonlocal total
        share, mean = [0.0] * experts, [0.0] * experts
        for row, weight in zip(x, counted, strict=True):
            chances = rate({"layers.mlp.router": np.asarray(weights["layers.mlp.router"], np.float64)}, layer, row)
            for e in choose(config, chances):
                share[e] += weight / config.moe.active / counted.sum()
            for e in range(experts):
                mean[e] += weight * chances[e] / counted.sum()
        total += experts * sum(a * b for a, b in zip(share, mean, strict=True))

    logits(config, weights, tokens, watch)
    return total
