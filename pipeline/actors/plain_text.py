"""Texts as columns: which are so plain that Arrow and Python agree on them, and what slots compare of them.

What is plain is not assumed: the table of characters is made from what Python and Arrow, as installed, say of each one.
"""

import functools
import sys
import unicodedata

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.edits import normalise

Mask = npt.NDArray[np.bool_]
FIRST_PRINTABLE = 0x20
# Hangul vowels and final consonants compose with what stands before them, as the second halves of decompositions do.
# What lies beyond (rare Han, tags, private use) is nowhere simple, so that making the table takes no time.
MOST_SIMPLE = 0x20000
COMPOSING_JAMO = [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]


def unclean(texts: pa.Array) -> Mask:
    """Texts with a control character or a white space other than the blank: stripping them is Python's business."""
    if _all_simple(texts):
        return np.zeros(len(texts), bool)
    return _mask(pc.match_substring_regex(texts, _unclean_class()))


def folded(texts: pa.Array) -> pa.Array:
    """`normalise` of clean, stripped texts without nulls, a column at a time where that says the same."""
    lower = pc.utf8_lower(texts)
    odd = np.zeros(len(texts), bool)
    blank = characters(texts) == ord(" ")
    if (blank[1:] & blank[:-1]).any():
        odd |= _mask(pc.match_substring(texts, "  "))
    if not _all_simple(texts):
        odd |= _mask(pc.match_substring_regex(texts, _simple_class()))
    if not odd.any():
        return lower
    where = pa.array(odd)
    return pc.replace_with_mask(lower, where, pa.array([normalise(text) for text in texts.filter(where).to_pylist()]))


def characters(texts: pa.Array) -> npt.NDArray[np.uint8]:
    """The bytes of all texts, one after the other: a column is looked through faster than its texts."""
    if not len(texts) or texts.buffers()[2] is None:
        return np.empty(0, np.uint8)
    offsets = np.frombuffer(texts.buffers()[1], np.int32, len(texts) + 1, texts.offset * 4)
    return np.frombuffer(texts.buffers()[2], np.uint8, int(offsets[-1] - offsets[0]), int(offsets[0]))


def _mask(found: pa.Array) -> Mask:
    mask: Mask = pc.fill_null(found, False).to_numpy(zero_copy_only=False)
    return mask.copy()


def _all_simple(texts: pa.Array) -> bool:
    """Whether all characters are simple, from the bytes of the whole column."""
    data = characters(texts)
    if not len(data):
        return True
    if data.min() < FIRST_PRINTABLE:
        return False
    leads = np.flatnonzero(data >= 0xC0)  # of characters of 2 to 4 bytes
    if not len(leads):
        return True
    lead = data[leads].astype(np.int32)
    tail = [data[np.minimum(leads + step, len(data) - 1)].astype(np.int32) & 0x3F for step in (1, 2, 3)]
    points = np.where(lead < 0xE0, (lead & 0x1F) << 6 | tail[0], (lead & 0x0F) << 12 | tail[0] << 6 | tail[1])
    points = np.where(lead < 0xF0, points, (lead & 0x07) << 18 | tail[0] << 12 | tail[1] << 6 | tail[2])
    return bool(_simple()[points].all())


@functools.cache
def _simple() -> Mask:
    """Characters that NFKC leaves alone wherever they stand, whose case folding is Arrow's lower case, and that are no
    white space but the blank."""
    composing = set(COMPOSING_JAMO)
    simple = np.zeros(sys.maxunicode + 1, bool)
    for point in range(MOST_SIMPLE):
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            composing.add(int(parts[1], 16))
    for point in range(FIRST_PRINTABLE, MOST_SIMPLE):
        char = chr(point)
        simple[point] = (
            unicodedata.category(char) not in ("Cs", "Cn")
            and not unicodedata.combining(char)
            and unicodedata.is_normalized("NFKC", char)
            and (char == " " or not char.isspace())
        )
    simple[list(composing)] = False
    points = np.flatnonzero(simple).tolist()
    lower = pc.utf8_lower(pa.array([chr(point) for point in points])).to_pylist()
    simple[[point for point, low in zip(points, lower, strict=True) if chr(point).casefold() != low]] = False
    return simple


@functools.cache
def _simple_class() -> str:
    return f"[^{_ranges(np.flatnonzero(_simple()))}]"


@functools.cache
def _unclean_class() -> str:
    spaces = [point for point in range(MOST_SIMPLE) if chr(point).isspace() and point != ord(" ")]
    return f"[{_ranges(np.array(sorted({*range(FIRST_PRINTABLE), *spaces})))}]"


def _ranges(points: npt.NDArray[np.intp]) -> str:
    pieces = np.split(points, np.flatnonzero(np.diff(points) > 1) + 1)
    return "".join(f"\\x{{{piece[0]:x}}}-\\x{{{piece[-1]:x}}}" for piece in pieces)
