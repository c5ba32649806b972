"""The quant types of llama.cpp by name: what each costs in bits, and which cannot be made without an importance matrix.

A table and a look-up; the work is in `quantize`. Bits per weight are llama.cpp's own measurements on Llama 3.1 8B
(tools/quantize/README.md), or the format's block size where it lists none.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from edgetune.errors import UsageError


@dataclass(frozen=True)
class QuantType:
    """One of llama.cpp's file types."""

    name: str
    """As in file names and on the command line, e.g. "Q4_K_M"."""
    ftype: int
    """`enum llama_ftype`."""
    bits: float
    """Bits per weight of a typical file."""
    note: str = ""
    """What it is good for."""
    needs_imatrix: bool = False
    """llama.cpp refuses to make it without an importance matrix."""
    only_copy: bool = False
    """Tensors are copied as they are."""


_ROWS = (
    QuantType("F32", 0, 32.0, "exact"),
    QuantType("F16", 1, 16.0, "half precision"),
    QuantType("BF16", 32, 16.0, "half precision, the range of F32"),
    QuantType("Q8_0", 7, 8.5, "next to no loss"),
    QuantType("Q6_K", 18, 6.56, "very small loss"),
    QuantType("Q5_K_M", 17, 5.70, "small loss"),
    QuantType("Q5_K_S", 16, 5.57, "small loss"),
    QuantType("Q5_1", 9, 6.0, "older 5-bit format with offsets"),
    QuantType("Q5_0", 8, 5.5, "older 5-bit format"),
    QuantType("Q4_K_M", 15, 4.89, "the usual choice"),
    QuantType("Q4_K_S", 14, 4.67, "a little smaller and worse than Q4_K_M"),
    QuantType("IQ4_NL", 25, 4.68, "4-bit, non-linear"),
    QuantType("IQ4_XS", 30, 4.46, "4-bit, non-linear, smaller"),
    QuantType("Q4_1", 3, 5.0, "older 4-bit format with offsets"),
    QuantType("Q4_0", 2, 4.5, "older 4-bit format, fast on ARM"),
    QuantType("MXFP4_MOE", 38, 4.25, "MXFP4 for the experts of a mixture model, Q8_0 besides"),
    QuantType("Q3_K_L", 13, 4.30, "noticeable loss"),
    QuantType("Q3_K_M", 12, 4.00, "noticeable loss"),
    QuantType("Q3_K_S", 11, 3.64, "large loss"),
    QuantType("IQ3_M", 27, 3.76, "3-bit mix"),
    QuantType("IQ3_S", 26, 3.66, "3-bit"),
    QuantType("IQ3_XS", 22, 3.50, "3-bit, smaller", needs_imatrix=True),
    QuantType("IQ3_XXS", 23, 3.25, "3-bit, smallest", needs_imatrix=True),
    QuantType("Q2_K", 10, 3.16, "very large loss"),
    QuantType("Q2_K_S", 21, 2.97, "very large loss", needs_imatrix=True),
    QuantType("IQ2_M", 29, 2.93, "2-bit mix", needs_imatrix=True),
    QuantType("IQ2_S", 28, 2.74, "2-bit", needs_imatrix=True),
    QuantType("IQ2_XS", 20, 2.59, "2-bit, smaller", needs_imatrix=True),
    QuantType("IQ2_XXS", 19, 2.38, "2-bit, smallest", needs_imatrix=True),
    QuantType("Q2_0", 41, 2.25, "2-bit in groups of 64, for models trained that way"),
    QuantType("TQ2_0", 37, 2.06, "for models trained with ternary weights"),
    QuantType("TQ1_0", 36, 1.69, "for models trained with ternary weights"),
    QuantType("IQ1_M", 31, 2.15, "barely usable", needs_imatrix=True),
    QuantType("IQ1_S", 24, 2.00, "barely usable", needs_imatrix=True),
    QuantType("Q1_0", 40, 1.13, "1-bit, for models trained that way"),
    QuantType("COPY", 0, 0.0, "copies every tensor as it is", only_copy=True),
)

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""llama.cpp's short names."""

QUANT_TYPES: dict[str, QuantType] = {row.name: row for row in _ROWS}
"""Every type `quantize` takes, best first."""


def find_quant_type(name: str) -> QuantType:
    """The type called `name`, in any case, aliases included. Raises `UsageError` for another name."""
    wanted = name.strip().upper().replace("-", "_")
    wanted = ALIASES.get(wanted, wanted)
    if wanted in QUANT_TYPES:
        return QUANT_TYPES[wanted]
    close = get_close_matches(wanted, [*QUANT_TYPES, *ALIASES], n=1)
    raise UsageError(
        f"{name!r} is not a quant type of llama.cpp.",
        hint=(f"Did you mean {close[0]}? " if close else "") + "`edgetune quantize --list` shows them all.",
    )
