"""Recordings in tables of text: CSV, TSV, blanks between the numbers, one number a line, PhysioBank's text."""

import array
import datetime
import math
import re
from pathlib import Path

import numpy as np

from ralenet_jax.errors import UserError
from ralenet_jax.readers_recording import Recording, find_leads

_TIME = re.compile(
    r"(elapsed )?(time|t|s|ms|us|sec\w*|milli\w*|micro\w*|timestamp|date|datetime|sample\w*|index)\b", re.I
)
_COUNT = re.compile(r"(sample|index)", re.I)
_GAPS = {"", "nan", "na", "n/a", "null", "none", "-"}
_NUMBERED = re.compile(r",0(,\d+)*|0,1,2(,\d+)*")  # a header of Pandas: numbers of the columns
_LONGEST_HEADER = 50  # lines of a table
_LONGEST_TITLE = 200  # characters of a column's name with its unit; the pattern takes the square of it
_SLOWEST = 20  # Hz; below it a column of times is in a smaller unit
_SCALES = {r"s|sec\w*": 1, r"ms|msec|milli\w*": 1e3, r"[uµμ]s|usec|micro\w*": 1e6, r"ns|nano\w*": 1e9}


def is_table(path: Path) -> bool:
    """Whether a file of text begins with a table of numbers."""
    with path.open("rb") as file:
        head = file.read(2**16)
    lines = head.decode("latin-1").splitlines()
    try:
        _layout(lines[:-1] if len(head) == 2**16 else lines)  # the last one may be cut
    except ValueError:
        return False
    return True


def _number(cell: str) -> float:
    """A cell of a table: a number, a gap, a time of the day in seconds, or a date."""
    try:
        return float(cell)
    except ValueError:
        cell = cell.strip(" \"'").replace(",", ".")
    if cell.lower() in _GAPS:
        return math.nan
    if re.fullmatch(r"(\d+:)?\d+:\d+(\.\d*)?", cell):
        return sum(float(part) * 60**power for power, part in enumerate(reversed(cell.split(":"))))
    try:
        return float(cell)
    except ValueError:
        date = datetime.datetime.fromisoformat(cell)
        return date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp()


def _numbers(line: str, delimiter: str | None) -> list[float] | None:
    try:
        return [_number(cell) for cell in line.split(delimiter)]
    except ValueError:
        return None


def _layout(lines: list[str]) -> tuple[int, str | None, int]:
    """Lines of the header, delimiter (None: blanks) and columns of a table."""
    delimiters = [";", "\t", ",", None]  # with which there may be numbers
    for start in range(min(len(lines), _LONGEST_HEADER)):
        if _NUMBERED.fullmatch(lines[start]):
            continue
        found = []
        for delimiter in delimiters[:]:
            rows = [_numbers(line, delimiter) for line in lines[start : start + 2]]
            if len(rows) < 2 or None in rows or len(rows[0]) != len(rows[1]):
                continue
            if any(math.isfinite(value) for line in lines[start:] for value in _numbers(line, delimiter) or ()):
                found.append((start, delimiter, len(rows[0])))
            else:
                delimiters.remove(delimiter)
        if found:
            best = max(found, key=lambda layout: layout[2])
            for line in lines[:start]:
                if len(_numbers(line, best[1]) or []) == best[2] > 1 and not _NUMBERED.fullmatch(line):
                    raise ValueError(f"after {line[:40]!r} comes a line that is none of a table")
            return best
    raise ValueError("no table of numbers in it")


def read(path: Path, rate: float | None) -> Recording:
    """Reads a table, whose delimiter, header and column of times are found out; a rate counts more than the times."""
    raw = path.read_bytes()
    encoding = (
        "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig" if raw[:3] == b"\xef\xbb\xbf" else "utf-8"
    )
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        encoding, text = "latin-1", raw.decode("latin-1")
    if "\0" in text:
        raise ValueError("bytes that are no text")
    newline = next((mark for mark in ("\r\n", "\n", "\r") if mark in text), "\n")
    body = text.rstrip("\r\n")
    lines = body.split(newline)
    start, delimiter, width = _layout(lines)
    cells = array.array("d")
    for row, line in enumerate(lines[start:]):
        numbers = _numbers(line, delimiter)
        if numbers is None or len(numbers) != width:
            raise UserError(f"{path}, line {start + row + 1}: {line[:40]!r}; expected {width} numbers; mend that line")
        cells.extend(numbers)
    values = np.frombuffer(cells).reshape(-1, width)
    names, units = _titles(lines[:start], delimiter, width)
    time = _time_column(values, names)
    if time is not None and rate is None:
        rate = _rate_of(values[:, time], names[time], units[time], path)
    columns = [column for column in range(width) if column != time]
    names, units = [names[column] or f"ch{column}" for column in columns], [units[column] for column in columns]
    signal = values[:, columns]
    leads = tuple(lead for lead in find_leads(names, units) if not np.isnan(signal[:, lead]).all())
    keep = {"lines": lines, "start": start, "delimiter": delimiter, "columns": columns}
    keep |= {"encoding": encoding, "newline": newline, "tail": text[len(body) :]}
    return Recording(signal, rate or 0.0, tuple(names), tuple(units), leads, path, "csv", keep)


def _titles(header: list[str], delimiter: str | None, width: int) -> tuple[list[str], list[str]]:
    """Names and units of the columns, "" where there are none: of lines like `time (s),II [mV]`, or one for each."""
    rows = [line.lstrip("# ").split(delimiter) for line in header]
    rows = [[cell.strip(" \"'") for cell in row] for row in rows if len(row) == width]
    names, units = (rows + [[""] * width] * 2)[:2]
    for column, name in enumerate(names):
        match = re.fullmatch(r"(.+?)\s*[(\[]([^()\[\]]*)[)\]]", name[:_LONGEST_TITLE])
        if match:
            names[column], units[column] = match.groups()
    return names, units


def _time_column(values: np.ndarray, names: list[str]) -> int | None:
    if len(names) == 1:
        return None
    named = [column for column, name in enumerate(names) if _TIME.match(name.replace("_", " "))]
    if named or names[0]:
        return named[0] if named else None
    steps = np.diff(values[:, 0])
    even = len(steps) > 1 and steps.min() > 0 and _deviation(values[:, 0]) < 0.6 * steps.mean()
    return 0 if even else None


def _deviation(times: np.ndarray) -> float:
    """How far times are at most from even ones between the first and the last."""
    return np.abs(times - np.linspace(times[0], times[-1], len(times))).max()


def _rate_of(times: np.ndarray, name: str, unit: str, path: Path) -> float | None:
    """Hz from a column of times; None where it only counts."""
    span, deviation = times[-1] - times[0], _deviation(times)
    step = span / (len(times) - 1)
    if not (np.diff(times).min() > 0 and deviation < 0.75 * step):
        raise UserError(f"{path}: the times in column {name!r} are not evenly spaced; resample it, or pass --rate")
    if _COUNT.match(name) or (not name and step == 1):
        return None
    word = unit or name.replace("_", " ").split(" ")[-1]
    told = [scale for pattern, scale in _SCALES.items() if re.fullmatch(pattern, word, re.IGNORECASE)]
    rate = next((scale / step for scale in told or _SCALES.values() if told or scale / step >= _SLOWEST), None)
    if rate and abs(rate - round(rate)) <= rate * (2 * deviation / span + 1e-6):  # times are rounded
        return float(round(rate))
    return rate


def write(recording: Recording, signal: np.ndarray, changed: list[int], path: Path) -> None:
    """Writes the file again, with other cells where a value changed."""
    keep = recording.keep
    start, delimiter, lines = keep["start"], keep["delimiter"], keep["lines"][:]
    rows = [line.split(delimiter) for line in lines[start : start + 200]]
    places = [
        _decimals([row[column] for row in rows], signal[:, channel]) for channel, column in enumerate(keep["columns"])
    ]
    comma = delimiter != "," and any("," in cell for row in rows for cell in row)
    gap = "nan" if delimiter is None else ""
    for index, values in enumerate(signal if changed else []):
        cells = lines[start + index].split(delimiter)
        for channel in changed:
            column, value, old = keep["columns"][channel], values[channel], recording.signal[index, channel]
            if not math.isnan(value) and value != old:
                text = f"{value:.{places[channel]}f}"
                cells[column] = text.replace(".", ",") if comma else text
            elif math.isnan(value) and not math.isnan(old):
                cells[column] = gap
        lines[start + index] = (delimiter or " ").join(cells)
    path.write_bytes((keep["newline"].join(lines) + keep["tail"]).encode(keep["encoding"]))


def _decimals(cells: list[str], values: np.ndarray) -> int:
    """Digits after the point: as many as there were, and enough for 6 significant ones of the largest value."""
    numbers = [
        cell.strip(" \"'").lower().replace(",", ".").partition("e") for cell in cells if not math.isnan(_number(cell))
    ]
    there = max((len(mantissa.partition(".")[2]) - int(power or 0) for mantissa, _, power in numbers), default=0)
    largest = np.nanmax(np.abs(values), initial=0)
    return max(there, 5 - math.floor(math.log10(largest)) if largest else 0, 0)


def convert(recording: Recording, signal: np.ndarray, changed: list[int], path: Path) -> None:
    """Writes a table with a column of times and a line of names and units."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    pairs = zip(recording.names, recording.units, strict=True)
    titles = [f"{name} ({unit})" if unit else name for name, unit in pairs]
    titles = ["time (s)", *(re.sub(r"[,;\t\r\n]", " ", title) for title in titles)]
    table = np.column_stack([np.arange(len(signal)) / recording.sampling_rate, signal])
    formats = ["%.9f", *(f"%.{_decimals([], values)}f" for values in signal.T)]
    np.savetxt(path, table, formats, delimiter, header=delimiter.join(titles), comments="", encoding="utf-8")
