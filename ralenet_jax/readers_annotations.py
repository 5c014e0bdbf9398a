"""Annotations of a WFDB record: where each stands, and its code.

wfdb reads them too, but does not come back from some notes that a file may hold.
"""

import array
import dataclasses
from pathlib import Path

import numpy as np
from wfdb.io.annotation import ann_label_table

SYMBOLS = dict(zip(ann_label_table["label_store"], ann_label_table["symbol"], strict=True))
_NOTE, _SKIP, _AUX, _FIRST_FIELD = 22, 59, 63, 60
_LONGEST = 2**24  # bytes of a file, ten times as many are needed to read it: 8 million beats, a month or two


@dataclasses.dataclass(frozen=True)
class Annotations:
    """Annotations of a record.

    Attributes:
        sample: int64 `[N]`, at the record's rate.
        code: int64 `[N]`, as the format stores it.
    """

    sample: np.ndarray
    code: np.ndarray

    @property
    def symbol(self) -> list[str]:
        """`[N]`, as PhysioNet prints the codes: "N" is a normal beat; "" for a code it does not know."""
        return [SYMBOLS.get(code, "") for code in self.code.tolist()]


def read(path: str | Path) -> Annotations:
    """Reads a file in the MIT format: pairs of bytes, each of 6 bits that say what and 10 bits of time or length.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is cut or too long, or has an annotation outside any record.
    """
    size = Path(path).stat().st_size
    if size % 2 or not 0 < size <= _LONGEST:
        raise ValueError(f"{size} bytes; expected pairs, {_LONGEST} bytes at most")
    pairs = memoryview(Path(path).read_bytes()).cast("H")
    samples, codes, time, place = array.array("q"), array.array("B"), 0, 0
    while place < len(pairs) - 1:  # the last one only ends the file
        code, value = divmod(pairs[place], 1024)
        place += 1
        if code == _SKIP:
            if place + 2 > len(pairs):
                raise ValueError("it ends within an annotation")
            skip = pairs[place] << 16 | pairs[place + 1]
            time += skip - (skip >> 31 << 32)  # a signed number
            place += 2
        elif code == _AUX:
            place += (value % 256 + 1) // 2  # a text
        elif code < _FIRST_FIELD:
            time += value
            # Without a code it is none; a note at the start describes the file.
            if code and not (code == _NOTE and time == 0):
                samples.append(time)
                codes.append(code)
    sample = np.frombuffer(samples, np.int64)
    if len(sample) and not 0 <= sample.min() <= sample.max() < 2**31:
        raise ValueError(f"annotations from sample {sample.min()} to {sample.max()}; a record begins at 0")
    return Annotations(sample, np.frombuffer(codes, np.uint8).astype(np.int64))
