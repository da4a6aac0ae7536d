"""Units: decimal GB, parsing what people type, and printing what people read.

GB is 10^9 bytes and GiB is 2^30; the two are never mixed. Durations that are
stored or compared are integer nanoseconds; laws work in seconds as floats.
"""

import math
import re

from tierline.base.errors import InputError

GB = 10**9
GIB = 2**30
NS_PER_S = 10**9
HOURS_PER_YEAR = 8760

_DURATION_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "min": 60 * 10**9}
_DURATION_NS |= {"h": 3600 * 10**9, "d": 86400 * 10**9}
_SIZE_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_duration_ns(text: str, *, what: str = "duration") -> int:
    """Nanoseconds from '2s', '50ms', '1.5min'.

    Raises `InputError` without a unit, with an unknown unit, or when not positive.

    >>> parse_duration_ns("50ms")
    50000000
    """
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None or match.group(2) not in _DURATION_NS:
        raise InputError(
            f"{what} {text!r} is not a duration", hint="write a number and a unit: 2s, 50ms, 1.5min"
        )
    duration_ns = round(float(match.group(1)) * _DURATION_NS[match.group(2)])
    if duration_ns <= 0:
        raise InputError(f"{what} {text!r} is not positive", hint="a duration is above zero")
    return duration_ns


def parse_bytes(text: str, *, what: str = "size") -> int:
    """Bytes from '512GB', '1.5TB', '80GiB'; decimal unless the unit says binary.

    >>> parse_bytes("1.5TB")
    1500000000000
    """
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None or match.group(2) not in _SIZE_BYTES:
        raise InputError(
            f"{what} {text!r} is not a size", hint="write a number and a unit: 512GB, 1.5TB, 80GiB"
        )
    return round(float(match.group(1)) * _SIZE_BYTES[match.group(2)])


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, thousands separated, never in E notation.

    >>> significant(1138800), significant(0.012345), significant(2.0)
    ('1,140,000', '0.0123', '2.00')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    return f"{rounded:,.{max(decimals, 0)}f}"


def format_bytes(count: float) -> str:
    """Bytes for people, decimal: '42.9 GB'.

    >>> format_bytes(42_949_672_960)
    '42.9 GB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{significant(count / size)} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds for people: '48.1 ms', '2.30 s', '4.50 min'.

    >>> format_seconds(0.0481)
    '48.1 ms'
    """
    if not math.isfinite(seconds):
        return "unbounded"
    if seconds >= 7200:
        return f"{significant(seconds / 3600)} h"
    if seconds >= 120:
        return f"{significant(seconds / 60)} min"
    if seconds >= 1 or seconds == 0:
        return f"{significant(seconds)} s"
    if seconds >= 1e-3:
        return f"{significant(seconds * 1e3)} ms"
    return f"{significant(seconds * 1e6)} us"


def format_usd(usd: float) -> str:
    """Dollars for people: '$1.14 M', '$2.95', '$0.184'.

    >>> format_usd(1_138_800)
    '$1.14 M'
    """
    for unit, size in ((" B", 1e9), (" M", 1e6), (" k", 1e4)):
        if abs(usd) >= size:
            return f"${significant(usd / (1e3 if unit == ' k' else size))}{unit}"
    return f"${significant(usd)}"
