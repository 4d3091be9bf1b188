"""The ledger of a compressed model: for each parameter its format, its bytes, and how far it moved; and the totals.

Everything counts: norm gains, scales, indices, and weights that no rule touched. A figure like "4.3 bits a weight" is
bytes on disk over parameters of the model, or it is not comparable with anybody's.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from rich.table import Table

from hsai.compress.allocate import Item, Option
from hsai.files import write_json_atomic
from hsai.formats import (
    DenseConfig,
    FormatConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    OutliersConfig,
    Packed,
    SparseConfig,
    TernaryConfig,
    Weight,
)
from hsai.formats.storage import NAMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One parameter; stacked layers are one."""

    weight: str
    """Its dotted name in the model."""

    format: str
    """For people: "int4 g64", "2:4 bfloat16", "float32"."""

    shape: tuple[int, ...]
    """The logical shape."""

    bytes: int
    """Bytes of all its arrays."""

    relative_error: float | None
    """||w - packed|| / ||w||, Frobenius norms over all layers, w the weight of the model that was compressed, behind
    its transforms; 0 for a dense weight that was left as it is; None for one that was packed before, and stayed."""

    @property
    def size(self) -> int:
        """Logical weights."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all its arrays for each logical weight."""
        return 8.0 * self.bytes / self.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRow:
    """How one weight of one layer was packed, where calibration looked on."""

    weight: str
    """Its name in the model."""

    layer: int | None
    """Its number, from 0; None for the head."""

    format: str
    """For people, as that of a parameter."""

    output_error: float | None
    """||X (w - v)|| / ||X w|| over calibration, rows of X scaled to one norm, so that each token counts the same
    (`hsai.formats.observed.level_rows`); None where float32 does not hold it."""

    damping: float | None
    """What the factorization took, of experts the most; None where there was none: of Wanda's masks, of weights
    that are rounded by themselves, be it because the solve failed, and of dense ones."""

    note: str = ""
    """Why, if it failed, or took more damping; and of experts, which of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockRow:
    """How the reconstruction of one layer went, on windows that it was not tuned on.

    Errors are |y - t| / |t|, y the layer's output behind packed layers and t what the dense model has there, as a root
    mean square over tokens.
    """

    layer: int
    """Its number, from 0."""

    error_solved: float | None
    """As the solver left it; None where it is no number."""

    error_tuned: float | None
    """After tuning; None where tuning diverged."""

    tuned: bool
    """Whether that was better, and kept."""

    note: str = ""
    """What became of an error that is no number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRow:
    """Which scales some channels of one layer got before their readers were compressed.

    Errors are ||X (w - v)|| / ||X w|| over calibration, each token counting the same, of weights that are rounded by
    themselves, as a root mean square over those that read the channels; None where float32 does not hold them.
    """

    source: str
    """What makes the channels, by its name in the model."""

    layer: int | None
    """Its number, from 0; None for the last normalization."""

    exponent: float
    """Of the channels' activations; 0 leaves them as they are."""

    error_before: float | None
    """Without scales."""

    error_after: float | None
    """With them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """How a budget was spent."""

    budget: int
    """Bytes that all parameters might hold."""

    least: int
    """What they would hold with the smallest candidates."""

    most: int
    """What they would hold with the candidates of least loss: a larger budget buys nothing."""

    items: tuple[Item, ...]
    """What was to be chosen, and among what."""

    chosen: tuple[int, ...]
    """Which option of each item."""

    @property
    def options(self) -> list[Option]:
        """What each item got."""
        return [item.options[index] for item, index in zip(self.items, self.chosen, strict=True)]

    @property
    def formats(self) -> dict[str, tuple[FormatConfig, ...]]:
        """Of each weight by its name: that of each layer, or the one of a table."""
        found: dict[str, tuple[FormatConfig, ...]] = {}
        for item, option in zip(self.items, self.options, strict=True):
            found[item.weight] = (*found.get(item.weight, ()), option.format)
        return found

    @property
    def loss(self) -> float | None:
        """The sum of what was measured for the choice, in nats a token: a forecast of the divergence; None where that
        of one is no number."""
        return sum_losses(self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the totals, and for each item its choice and all candidates."""

        def describe(option: Option) -> dict[str, Any]:
            return {"format": name_format(option.format), "bytes": option.bytes, "loss": option.loss}

        choices = [
            {
                "weight": item.weight,
                "layer": item.layer,
                **describe(option),
                "candidates": [describe(other) for other in item.options],
            }
            for item, option in zip(self.items, self.options, strict=True)
        ]
        totals = {"budget": self.budget, "least": self.least, "most": self.most, "loss": self.loss}
        return {**totals, "choices": choices}

    def table(self) -> Table:
        """For the console, of any width: a row a weight, with the layers of each of its formats."""
        table = Table()
        table.add_column("weight", no_wrap=True)
        table.add_column("formats: layers")
        table.add_column("nats a token", justify="right", no_wrap=True)
        rows: dict[str, list[tuple[int | None, Option]]] = {}
        for item, option in zip(self.items, self.options, strict=True):
            rows.setdefault(item.weight, []).append((item.layer, option))
        for weight, choices in rows.items():
            layers: dict[str, list[int]] = {}
            for layer, option in choices:
                layers.setdefault(name_format(option.format), []).extend([] if layer is None else [layer])
            formats = [f"{name}: {name_ranges(numbers)}" if numbers else name for name, numbers in layers.items()]
            loss = sum_losses([option for _, option in choices])
            table.add_row(weight, "; ".join(formats), "no number" if loss is None else f"{loss:.2g}")
        return table


def sum_losses(options: Sequence[Option]) -> float | None:
    """What they cost together; None where that of one is no number."""
    losses = [option.loss for option in options if option.loss is not None]
    return sum(losses) if len(losses) == len(options) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """What a compressed model consists of."""

    rows: tuple[LedgerRow, ...]
    """Every parameter of the model, in its order."""

    layers: tuple[LayerRow, ...] = ()
    """What calibration saw of the weights that are packed in layers, and of a head that is solved."""

    blocks: tuple[BlockRow, ...] = ()
    """How each layer's reconstruction went, where there was one."""

    allocation: Allocation | None = None
    """How the budget was spent, where there was one."""

    scales: tuple[ScaleRow, ...] = ()
    """How channels were scaled beforehand, where they were."""

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return sum(row.bytes for row in self.rows)

    @property
    def size(self) -> int:
        """Parameters of the model."""
        return sum(row.size for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all arrays for each parameter, norm gains included."""
        return 8.0 * self.bytes / self.size

    @property
    def remarks(self) -> list[str]:
        """What did not go as asked, for people: a line for each weight and note, with the layers that say it."""
        layers: dict[tuple[str, str], list[str]] = {}
        rows: list[LayerRow | BlockRow] = [*self.layers, *self.blocks]
        for row in rows:
            if row.note:
                found = layers.setdefault((row.weight if isinstance(row, LayerRow) else "", row.note), [])
                found += [] if row.layer is None else [str(row.layer)]
        lines = []
        for (weight, note), numbers in layers.items():
            place = [weight] if weight else []
            place += [f"layer {', '.join(numbers)}"] if numbers else []
            lines.append(f"{', '.join(place)}: {note}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {"weights": [...], "parameters": ..., "bytes": ..., "bits_per_weight": ...}; "layers" where
        calibration looked on, "blocks" where layers were reconstructed, "allocation" where there was a
        budget, "scales" where channels were scaled."""
        weights = [
            {
                "weight": row.weight,
                "format": row.format,
                "shape": list(row.shape),
                "bytes": row.bytes,
                "bits_per_weight": row.bits_per_weight,
                "relative_error": row.relative_error,
            }
            for row in self.rows
        ]
        total = {"parameters": self.size, "bytes": self.bytes, "bits_per_weight": self.bits_per_weight}
        layers = {"layers": [dataclasses.asdict(row) for row in self.layers]} if self.layers else {}
        allocation = {} if self.allocation is None else {"allocation": self.allocation.to_dict()}
        blocks = {"blocks": [dataclasses.asdict(row) for row in self.blocks]} if self.blocks else {}
        scales = {"scales": [dataclasses.asdict(row) for row in self.scales]} if self.scales else {}
        return {"weights": weights, **layers, **blocks, **allocation, **scales, **total}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` as JSON, whole or not at all."""
        write_json_atomic(path, self.to_dict())

    def table(self) -> Table:
        """For the console: a row a parameter, and the totals below."""
        table = Table(show_footer=True)
        table.add_column("weight", footer="all parameters", no_wrap=True)
        table.add_column("format", no_wrap=True)
        table.add_column("shape", justify="right", footer=f"{self.size:,}")
        table.add_column("bytes", justify="right", footer=f"{self.bytes:,}")
        table.add_column("bits a weight", justify="right", footer=f"{self.bits_per_weight:.3f}")
        table.add_column("relative error", justify="right")
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            table.add_row(
                row.weight,
                row.format,
                shape,
                f"{row.bytes:,}",
                f"{row.bits_per_weight:.3f}",
                write_error(row.relative_error),
            )
        return table


def keep_finite(x: jax.Array | float) -> float | None:
    """A measured number as a ledger holds it: None for NaN and infinities, which JSON has no words for."""
    number = float(x)
    return number if math.isfinite(number) else None


def write_error(relative_error: float | None) -> str:
    """A row's `relative_error` for people."""
    if relative_error is None:
        return "as it was"
    return f"{relative_error:.2%}" if relative_error else "-"


def name_ranges(numbers: Sequence[int]) -> str:
    """Of ascending numbers: "0-3, 7"."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or n != numbers[i + 1] - 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def name_formats(formats: Sequence[FormatConfig]) -> str:
    """Of a weight whose layers have these formats: "int4 g64", or "3 x int8, 9 x int4 g64"."""
    counts = collections.Counter(map(name_format, formats))
    return ", ".join(f"{count} x {name}" if len(counts) > 1 else name for name, count in counts.items())


def name_format(format: FormatConfig | Weight) -> str:
    """A few words for a format or for the value that a weight already has."""
    match format:
        case DenseConfig():
            return format.dtype
        case Int8Config():
            return "int8"
        case Int4Config() | Int4OffsetConfig() | Int3Config() | Int2Config():
            return f"{format.format} g{format.group}"
        case TernaryConfig():
            return f"ternary g{format.group}" if format.group else "ternary"
        case SparseConfig():
            return f"{format.pattern_name} {format.value_name}"
        case OutliersConfig():
            return f"{name_format(format.base)}, {format.share:.3g} apart"
        case Packed():
            return NAMES[type(format)]
        case _:
            return str(format.dtype)
