"""A recording as `readers` gives it, what its name tells of its format, and which of its channels are ECG.

The modules of the formats have `read(path, rate)`, whose rate counts where the file has none; `write(recording, signal,
changed, path)`, which keeps what the recording's file held besides the channels that changed; and `convert`, of the
same arguments, for a recording that came in another format.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = {
    **{".hea": "wfdb", ".dat": "wfdb", ".edf": "edf", ".csv": "csv", ".tsv": "csv", ".txt": "csv"},
    **{".npy": "npy", ".npz": "npz", ".wav": "wav"},
}
_VOLTS = {"", "v", "mv", "uv", "µv", "μv", "nv", "adu", "nu"}
_NO_LEAD = re.compile(
    r"resp|abp|\bart|\bbp\b|pleth|ppg|sp?o2|co2|cvp|\bpap|icp|emg|eog|eeg|flow|thora|abdom|temp|pulse|\bhr\b|accel|"
    r"annotation|marker|trigger|\bevent|status|sound|snore|body|position|^(fpz?|af|f|c|t|p|o)(z|\d)-[a-z]+(z|\d)$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recording.

    Attributes:
        signal: `[L, channels]`, in physical units; NaN where there is a gap.
        sampling_rate: Hz.
        names: of the channels.
        units: of the channels, "" where the format does not tell.
        leads: the channels that are ECG, as far as name and unit tell; may be none.
        path: of the file, for WFDB of the header.
        format: "wfdb", "edf", "csv", "npy", "npz" or "wav".
        keep: what `write` of the format's module needs besides.
    """

    signal: np.ndarray
    sampling_rate: float
    names: tuple[str, ...]
    units: tuple[str, ...]
    leads: tuple[int, ...]
    path: Path
    format: str
    keep: Any


def find_leads(names: Sequence[str], units: Sequence[str]) -> tuple[int, ...]:
    """The channels that are ECG, as far as name and unit tell; may be none."""
    pairs = enumerate(zip(names, units, strict=True))
    return tuple(index for index, (name, unit) in pairs if unit.lower() in _VOLTS and not _NO_LEAD.search(name))
