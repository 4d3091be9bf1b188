"""The meaning of every kernel once more, in numpy float64 and Python loops, sharing no code with the sources."""

import numpy as np


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint32 (C * bits / 32, F) of integers (C, F): element e of a word at bit 8 * (e % 4) + bits * (e // 4).

    Of 3 bits, 32 elements have three words. Slots of 4 bits are as above, those of element e the slot e % 8, shared by
    four elements: e // 8 = 0 and 1 have its bits 0, 1 and 2, 3 of the first word, 2 and 3 the same of the second, and
    the highest bit of each is bit e // 8 of the slot in the third.
    """
    if bits == 3:
        words = np.zeros((values.shape[0] // 32 * 3, values.shape[1]), np.uint32)
        for row in range(values.shape[0]):
            element, first = row % 32, row // 32 * 3
            slot, turn = 8 * (element % 4) + 4 * (element // 4 % 2), element // 8
            value = values[row].astype(np.uint32)
            words[first + turn // 2] |= (value & np.uint32(3)) << np.uint32(slot + 2 * (turn % 2))
            words[first + 2] |= (value >> np.uint32(2)) << np.uint32(slot + turn)
        return words
    per_word = 32 // bits
    words = np.zeros((values.shape[0] // per_word, values.shape[1]), np.uint32)
    for row in range(values.shape[0]):
        element = row % per_word
        words[row // per_word] |= values[row].astype(np.uint32) << np.uint32(8 * (element % 4) + bits * (element // 4))
    return words


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 (C, F) from words (C * bits / 32, F): the inverse of `pack`."""
    elements = [words >> np.uint32(8 * (e % 4) + bits * (e // 4)) & np.uint32(2**bits - 1) for e in range(32 // bits)]
    return np.stack(elements, axis=1).reshape(-1, words.shape[1])


def find_zero(bits: int, centered: bool) -> float:
    """The code that stands for zero: the upper one of the two in the middle, or, centered, what lies between them."""
    return np.median(np.arange(2**bits)) if centered else 2**bits // 2


def draw_scale(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float64, of either sign, as those of 4-bit codes may have."""
    return rng.uniform(0.01, 0.1, shape) * np.random.default_rng(shape).choice([-1.0, 1.0], shape)


def scale_rows(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64 (D, F): row d of values times the scale of its group."""
    return values.astype(np.float64) * np.repeat(scale.astype(np.float64), values.shape[0] // scale.shape[0], axis=0)


def round_rows(x: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (..., D) codes of float32 x (..., D), and float64 (..., D) steps: largest / 127 of each row's groups."""
    split = np.asarray(x, np.float32).reshape(*x.shape[:-1], groups, -1)
    step = np.abs(split).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.rint(np.divide(split, step, out=np.zeros_like(split), where=step > 0))
    return codes.reshape(x.shape).astype(np.int64), np.broadcast_to(step, split.shape).reshape(x.shape).astype(float)


def densify(kept: np.ndarray, positions: np.ndarray, n: int, m: int = 4) -> np.ndarray:
    """float64 (D, F) with kept element c of column f at row m * (c // n) + positions[c, f]."""
    dense = np.zeros((kept.shape[0] * m // n, kept.shape[1]))
    for row in range(kept.shape[0]):
        at = m * (row // n) + positions[row].astype(np.int64)
        dense[at, np.arange(kept.shape[1])] = kept[row]
    return dense


def draw_positions(rng: np.random.Generator, size: int, columns: int, n: int, m: int = 4) -> np.ndarray:
    """uint8 (size * n / m, columns): n distinct, ascending positions for every group of m."""
    order = np.argsort(rng.random((size // m, m, columns)), axis=1)[:, :n]
    return np.sort(order, axis=1).reshape(-1, columns).astype(np.uint8)


def draw_choices(rng: np.random.Generator, size: int, blocks: int, m: int) -> np.ndarray:
    """uint8 (size * 4 / m, blocks): 4 distinct, ascending positions for every group of m."""
    order = np.argsort(rng.random((size // m, m, blocks)), axis=1)[:, :4]
    return np.sort(order, axis=1).reshape(-1, blocks).astype(np.uint8)


def pack_choices(choices: np.ndarray, m: int) -> np.ndarray:
    """uint32 (size / 32, blocks): bit i of word j is set for position 32 * j + i, with `choices` as drawn above."""
    words = np.zeros((choices.shape[0] // 4 * m // 32, choices.shape[1]), np.uint32)
    for row, block in np.ndindex(choices.shape):
        at = row // 4 * m + int(choices[row, block])
        words[at // 32, block] |= np.uint32(1) << np.uint32(at % 32)
    return words


def spread(compact: np.ndarray, choices: np.ndarray, m: int) -> np.ndarray:
    """float64 (D, F): row r of column f of `compact` (D * 4 / m, F) at m * (r // 4) + choices[r, block of f]."""
    rows, columns = compact.shape
    width = columns // choices.shape[1]
    dense = np.zeros((rows // 4 * m, columns))
    for row in range(rows):
        at = m * (row // 4) + np.repeat(choices[row].astype(np.int64), width)
        dense[at, np.arange(columns)] = compact[row]
    return dense


def find_rows(indices: np.ndarray, n: int, m: int, choices: np.ndarray | None = None) -> np.ndarray:
    """int64 (C, F): the row of the dense weight where each kept element stands, from packed indices of 2 bits, and
    choices as `pack_choices` gives them."""
    positions = unpack(indices, 2).astype(np.int64)
    rows = (4 if choices is not None else m) * (np.arange(len(positions)) // n)[:, None] + positions
    if choices is None:
        return rows
    bits = choices.T[:, :, None] >> np.arange(32, dtype=np.uint32) & 1
    chosen = np.nonzero(bits.reshape(choices.shape[1], -1))[1].reshape(choices.shape[1], -1).T
    return np.take_along_axis(np.repeat(chosen, indices.shape[1] // choices.shape[1], axis=1), rows, axis=0)


def pull_product(
    x: np.ndarray,
    weight: np.ndarray,
    largest: np.ndarray,
    pull: np.ndarray,
    *,
    scale: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The gradients of x (R, D) @ weight (D, F) for `pull` (R, F), each with the magnitudes of its terms.

    Of x, whose terms hold weights of up to `largest` (D, F); then of scale (G, F), or of elements that stand at `rows`
    (C, F) of the weight.
    """
    found = [(pull @ weight.T, np.abs(pull) @ largest.T)]
    to_weight, terms = x.T @ pull, np.abs(x).T @ np.abs(pull)
    if scale is not None:
        # A scale multiplies the levels of its group: its gradient is that of the weight, summed with them.
        steps, groups = scale_rows(np.ones(weight.shape), scale), (scale.shape[0], -1, scale.shape[1])
        pairs = (to_weight * weight, steps), (terms * largest, np.abs(steps))
        value, magnitude = ((a / b).reshape(groups).sum(axis=1) for a, b in pairs)
        found.append((value, magnitude))
    if rows is not None:
        found.append((np.take_along_axis(to_weight, rows, axis=0), np.take_along_axis(terms, rows, axis=0)))
    return found


def _list_seen(
    b: int,
    t: int,
    q_positions: np.ndarray,
    kv_positions: np.ndarray,
    q_segments: np.ndarray | None,
    kv_segments: np.ndarray | None,
    window: int | None,
) -> np.ndarray:
    """The keys that query t of batch row b sees."""
    distance = int(q_positions[b, t]) - np.asarray(kv_positions[b], np.int64)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if q_segments is not None and kv_segments is not None:
        seen &= np.asarray(q_segments[b, t] == kv_segments[b])
    return np.flatnonzero(seen)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    kv_positions: np.ndarray,
    q_segments: np.ndarray | None,
    kv_segments: np.ndarray | None,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> np.ndarray:
    """Attention (B, T, N, H), one query row of one head at a time."""
    out = np.zeros(q.shape)
    batch, queries, heads, _ = q.shape
    for b, t, head in np.ndindex(batch, queries, heads):
        kv_head = head // (heads // k.shape[2])
        seen = _list_seen(b, t, q_positions, kv_positions, q_segments, kv_segments, window)
        if not seen.size:
            continue
        scores = scale * (k[b, seen, kv_head] @ q[b, t, head])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, head] = weights @ v[b, seen, kv_head] / weights.sum()
    return out


def pull_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    kv_positions: np.ndarray,
    q_segments: np.ndarray | None,
    kv_segments: np.ndarray | None,
    window: int | None,
    softcap: float | None,
    scale: float,
    pull: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The gradients of `attend` to q, k and v for `pull` (B, T, N, H), each with the magnitudes of its terms, where a
    score is off by what its own terms allow."""
    found = [(np.zeros(a.shape), np.zeros(a.shape)) for a in (q, k, v)]
    for b, t, head in np.ndindex(*q.shape[:3]):
        kv_head = head // (q.shape[2] // k.shape[2])
        seen = _list_seen(b, t, q_positions, kv_positions, q_segments, kv_segments, window)
        if not seen.size:
            continue
        keys, values, row, grad = k[b, seen, kv_head], v[b, seen, kv_head], q[b, t, head], pull[b, t, head]
        scores, slope = scale * (keys @ row), np.ones(seen.size)
        if softcap is not None:
            slope = 1.0 - np.tanh(scores / softcap) ** 2
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        to_scores = scale * slope * weights * (values @ grad - weights @ values @ grad)
        # A weight is off by what its score is, and the mean of all; a slope by what its score is.
        terms = abs(scale) * (np.abs(keys) @ np.abs(row))
        near = weights * (1.0 + terms + weights @ terms)
        sizes = np.abs(values) @ np.abs(grad)
        near_scores = abs(scale) * (near * (sizes + weights @ sizes) + weights * (near @ sizes))
        for into, (by_score, by_weight, others) in enumerate(
            ((to_scores, weights, (keys, row, grad)), (near_scores, near, [np.abs(a) for a in (keys, row, grad)]))
        ):
            found[0][into][b, t, head] = by_score @ others[0]
            found[1][into][b, seen, kv_head] += np.outer(by_score, others[1])
            found[2][into][b, seen, kv_head] += np.outer(by_weight, others[2])
    return found


def lose(
    x: np.ndarray,
    w: np.ndarray,
    targets: np.ndarray,
    pull: np.ndarray,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cross-entropy of tokens (R, D) against (D, V), and the gradients to x and w for `pull` (R,): values, magnitudes.

    A magnitude is the sum of those of a result's terms, where each logit is off by what its own terms allow.
    """
    loss, d_x, d_w = np.zeros(len(x)), np.zeros(x.shape), np.zeros(w.shape)
    near, near_x, near_w = np.zeros(len(x)), np.zeros(x.shape), np.zeros(w.shape)
    for row, target in enumerate(targets):
        logits, largest = x[row] @ w, (np.abs(x[row]) @ np.abs(w)).max()
        slope = np.ones(len(logits))
        if softcap is not None:
            slope = 1.0 - np.tanh(logits / softcap) ** 2
            logits = softcap * np.tanh(logits / softcap)
        log_sum = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        loss[row] = log_sum - logits[target] + z_loss * log_sum**2
        chance = np.exp(logits - log_sum) * (1.0 + 2.0 * z_loss * log_sum)
        hit = np.arange(len(logits)) == target
        by_logit = pull[row] * (chance - hit) * slope
        d_x[row] = w @ by_logit
        d_w += np.outer(x[row], by_logit)
        near[row] = (1.0 + 2.0 * z_loss * abs(log_sum)) * (2.0 * largest + np.log(len(logits)) + 1.0)
        terms = abs(pull[row]) * (np.abs(chance) * (1.0 + 2.0 * largest) + hit)
        near_x[row] = np.abs(w) @ terms
        near_w += np.outer(np.abs(x[row]), terms)
    return [loss, d_x, d_w], [near, near_x, near_w]


def normalize_and_multiply(x: np.ndarray, gain: np.ndarray, w: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """RMS normalization of rows (R, D) and their product with (D, F): values, and the magnitudes of their terms."""
    rows = np.stack([row / np.sqrt(np.sum(row**2) / len(row) + eps) * gain for row in x])
    return rows @ w, np.abs(rows) @ np.abs(w)


def feed_forward(
    x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, activation: str
) -> tuple[np.ndarray, np.ndarray]:
    """The gated block of rows (R, D): values, and the magnitudes of their terms, inner products' terms included."""

    def activate(a: np.ndarray) -> np.ndarray:
        if activation == "silu":
            return a / (1.0 + np.exp(-a))
        return 0.5 * a * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (a + 0.044715 * a**3)))

    hidden = activate(x @ gate) * (x @ up)
    # Neither activation exceeds its argument, nor is it steeper than 1.13: what gate and up may be off by reaches on.
    terms = np.abs(x) @ np.abs(gate) * (np.abs(x) @ np.abs(up))
    return hidden @ down, 2.0 * terms @ np.abs(down)


def pull_normalize_and_multiply(
    x: np.ndarray, gain: np.ndarray, w: np.ndarray, eps: float, pull: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The gradients of `normalize_and_multiply` to x, gain and w for `pull` (R, F), with the magnitudes of terms."""
    size = np.sqrt(np.mean(x**2, axis=1, keepdims=True) + eps)

    def pull_back(rows: np.ndarray, gain: np.ndarray, w: np.ndarray, pull: np.ndarray, sign: float) -> list[np.ndarray]:
        back = pull @ w.T
        shared = rows * np.mean(gain * back * rows, axis=1, keepdims=True)
        return [(gain * back + sign * shared) / size, np.sum(rows * back, axis=0), (rows * gain).T @ pull]

    operands = (x / size, gain, w, pull)
    return list(zip(pull_back(*operands, -1.0), pull_back(*map(np.abs, operands), 1.0), strict=True))


def pull_feed_forward(
    x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, pull: np.ndarray, activation: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The gradients of `feed_forward` to x, gate, up and down for `pull` (R, D), with the magnitudes of their terms."""

    a, terms = x @ gate, np.abs(x) @ np.abs(gate)
    if activation == "silu":
        chance = 1.0 / (1.0 + np.exp(-a))
        active, slope = a * chance, chance * (1.0 + a * (1.0 - chance))
    else:
        inner, inner_slope = a + 0.044715 * a**3, 1.0 + 3 * 0.044715 * a**2
        bent = np.tanh(np.sqrt(2.0 / np.pi) * inner)
        active = 0.5 * a * (1.0 + bent)
        slope = 0.5 * (1.0 + bent) + 0.5 * a * (1.0 - bent**2) * np.sqrt(2.0 / np.pi) * inner_slope
    back, back_terms = pull @ down.T, np.abs(pull) @ np.abs(down).T
    ups, ups_terms = x @ up, np.abs(x) @ np.abs(up)
    # Each factor is off by as much of its own terms. An activation is no steeper than 1.13, and its slope no steeper
    # than 1: by so much they are off with the gate.
    to_gates = back * ups * slope
    gates_terms = np.abs(slope) * (back_terms * np.abs(ups) + np.abs(back) * ups_terms) + np.abs(back * ups) * terms
    to_ups, to_ups_terms = back * active, back_terms * np.abs(active) + np.abs(back) * 1.13 * terms
    hidden, hidden_terms = active * ups, 1.13 * terms * np.abs(ups) + np.abs(active) * ups_terms
    return [
        (to_gates @ gate.T + to_ups @ up.T, gates_terms @ np.abs(gate).T + to_ups_terms @ np.abs(up).T),
        (x.T @ to_gates, np.abs(x).T @ gates_terms),
        (x.T @ to_ups, np.abs(x).T @ to_ups_terms),
        (hidden.T @ pull, hidden_terms.T @ np.abs(pull)),
    ]
