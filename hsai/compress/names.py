"""What formats, layers and errors are called where people read them: in ledgers, tables, pages and messages."""

import collections
from collections.abc import Sequence

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
