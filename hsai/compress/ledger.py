"""The ledger of a compressed model: for each parameter its format, its bytes, and how far it moved; and the totals.

Everything counts: norm gains, scales, indices, and weights that no rule touched. A figure like "4.3 bits a weight" is
bytes on disk over parameters of the model, or it is not comparable with anybody's.
"""

import dataclasses
import math
import os
from typing import Any

import jax
from rich.table import Table

from hsai.compress.allocate import Allocation
from hsai.compress.names import write_error
from hsai.files import write_json_atomic


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
