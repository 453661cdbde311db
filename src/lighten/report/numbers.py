"""Numbers as the report writes them: true minus signs, three digits, no exponents."""

from __future__ import annotations

import math

from lighten.types import Estimate


def fixed(value: float, digits: int = 2) -> str:
    """A number with a true minus sign; a dash for what was not measured; no minus before a zero."""
    if not math.isfinite(value):
        return "—"
    text = f"{value:,.{digits}f}"
    return (text[1:] if float(text.replace(",", "")) == 0 and text[0] == "-" else text).replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """Like `fixed`, with a plus before what is above zero."""
    text = fixed(value, digits)
    return f"+{text}" if value > 0 and float(text.replace(",", "")) > 0 else text


def significant(value: float, digits: int = 3) -> str:
    """Three significant digits, never an exponent: 0.0123, 4.56, 78.9, 1,234."""
    if not math.isfinite(value) or value == 0:
        return fixed(value, 0)
    return fixed(value, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def pair(estimate: Estimate) -> str:
    """Value ± standard error."""
    return f"{fixed(estimate.value)} ± {fixed(estimate.error)}"


def saved(percent: float) -> str:
    """Shrink as the change of the size: 74 becomes −74%, and a file that grew gets a plus."""
    return f"{'+' if percent < -0.05 else ''}{fixed(-percent, 1)}%"


def nats(value: float) -> str:
    """A divergence: two digits, and a power of ten where zeros would hide them: 0.31, 0.00042, 1.2×10⁻⁶."""
    if not math.isfinite(value) or value == 0 or abs(value) >= 9.5e-5:
        return significant(value, 2)
    return _scientific(value)


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}×10{str(int(exponent)).translate(SUPERSCRIPT)}".replace("-", "−")


def power(value: float) -> str:
    """A round number on an axis: 0.01, 10⁻⁵."""
    return f"{value:g}" if value >= 9.5e-4 else _scientific(value).removeprefix("1×")


SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
