"""Recordings in tables of text: CSV, TSV, blanks between the numbers, one number a line, PhysioBank's text.

In memory are the bytes of the file and 9 for each number, for a while 4 more: four times the file where a number takes
4.3 characters with what divides it from the next. Where they take fewer, `check_memory` may refuse the file.
"""

import array
import datetime
import functools
import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ralenet_jax.errors import UserError
from ralenet_jax.readers_recording import Recording, blocks, check_memory, find_leads

_TIME = re.compile(
    r"(elapsed )?(time|t|s|ms|us|sec\w*|milli\w*|micro\w*|timestamp|date|datetime|sample\w*|index)\b", re.I
)
_COUNT = re.compile(r"(sample|index)", re.I)
_GAPS = {"", "nan", "na", "n/a", "null", "none", "-"}
_NUMBERED = re.compile(r",0(,\d+)*|0,1,2(,\d+)*")  # a header of Pandas: numbers of the columns
_LONGEST_HEADER = 50  # lines of a table
_HEAD = 2**22  # characters in which the layout shows
_LONGEST_LINE = 2**20  # characters: cells take many times their text
_BYTES = 13  # that a number takes while it is read
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
    encoding, newline = _encoding(raw)
    head = list(_without_ends(_text(raw, encoding, newline).readlines(_HEAD), newline))
    start, delimiter, width = _layout(head)
    head = head[:start]
    cells = array.array("d")
    lines = itertools.islice(_text(raw, encoding, newline), start, None)
    for row, line in enumerate(_without_ends(lines, newline)):
        numbers = _numbers(line, delimiter)
        if numbers is None or len(numbers) != width:
            raise UserError(f"{path}, line {start + row + 1}: {line[:40]!r}; expected {width} numbers; mend that line")
        cells.extend(numbers)
        check_memory(path, len(raw) + _BYTES * len(cells), len(raw))
    values = np.frombuffer(cells).reshape(-1, width)
    names, units = _titles(head, delimiter, width)
    time = _time_column(values, names)
    if time is not None and rate is None:
        rate = _rate_of(values[:, time], names[time], units[time], path)
    columns = [column for column in range(width) if column != time]
    names, units = [names[column] or f"ch{column}" for column in columns], [units[column] for column in columns]
    leads = tuple(lead for lead in find_leads(names, units) if not np.isnan(values[:, columns[lead]]).all())
    keep = {"raw": raw, "encoding": encoding, "newline": newline}
    keep |= {"start": start, "delimiter": delimiter, "columns": columns}
    rate, names, units = rate or 0.0, tuple(names), tuple(units)
    return Recording(lambda part: values[part, columns], len(values), rate, names, units, leads, path, "csv", keep)


def _encoding(raw: bytes) -> tuple[str, str]:
    """The encoding of a text and what ends its lines."""
    is_wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    for encoding in ("utf-16" if is_wide else "utf-8-sig" if raw[:3] == b"\xef\xbb\xbf" else "utf-8", "latin-1"):
        text = _text(raw, encoding, "")
        try:
            has_null = any("\0" in piece for piece in iter(functools.partial(text.read, 2**16), ""))
        except UnicodeDecodeError:
            continue
        if has_null:
            raise ValueError("bytes that are no text")
        return encoding, next((mark for mark in ("\r\n", "\n", "\r") if mark in (text.newlines or ())), "\n")


def _text(raw: bytes, encoding: str, newline: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(raw), encoding, newline=newline)


def _without_ends(lines: Iterable[str], newline: str) -> Iterator[str]:
    """Lines without what ends them, but for blank ones at the end."""
    blank = 0
    for line in lines:
        if len(line) > _LONGEST_LINE:
            raise ValueError(f"a line of {len(line)} characters")
        if line.strip("\r\n"):
            yield from itertools.repeat("", blank)
            yield line.removesuffix(newline)
            blank = 0
        else:
            blank += 1


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
    times = values[:, 0]
    even = len(times) > 2 and np.diff(times).min() > 0
    return 0 if even and _deviation(times) < 0.6 * (times[-1] - times[0]) / (len(times) - 1) else None


def _deviation(times: np.ndarray) -> float:
    """How far times are at most from even ones between the first and the last."""
    difference = np.linspace(times[0], times[-1], len(times))
    difference -= times
    return max(difference.max(), -difference.min())


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


def write(recording: Recording, new: dict[int, np.ndarray], path: Path) -> None:
    """Writes the file again, with other cells where a value changed."""
    keep = recording.keep
    delimiter, newline, columns = keep["delimiter"], keep["newline"], keep["columns"]
    text = _text(keep["raw"], keep["encoding"], newline)
    header, lines = ([next(text) for _ in range(count)] for count in (keep["start"], min(recording.length, 200)))
    rows = [line.removesuffix(newline).split(delimiter) for line in lines]
    places = {channel: _decimals([row[columns[channel]] for row in rows], values) for channel, values in new.items()}
    comma = delimiter != "," and any("," in cell for row in rows for cell in row)
    gap, text = "nan" if delimiter is None else "", itertools.chain(lines, text)
    with path.open("w", encoding=keep["encoding"], newline="") as file:
        file.writelines(header)
        for part in blocks(recording.length, len(columns)):
            old = recording.rows(part)
            for index, line in enumerate(itertools.islice(text, part.stop - part.start)):
                changes = {}
                for channel, values in new.items():
                    value, before = values[part.start + index], old[index, channel]
                    if not math.isnan(value) and value != before:
                        number = f"{value:.{places[channel]}f}"
                        changes[columns[channel]] = number.replace(".", ",") if comma else number
                    elif math.isnan(value) and not math.isnan(before):
                        changes[columns[channel]] = gap
                file.write(_with_cells(line, changes, delimiter, newline) if changes else line)
        file.writelines(text)


def _with_cells(line: str, changes: dict[int, str], delimiter: str | None, newline: str) -> str:
    body = line.removesuffix(newline)
    cells = [changes.get(column, cell) for column, cell in enumerate(body.split(delimiter))]
    return (delimiter or " ").join(cells) + line[len(body) :]


def _decimals(cells: list[str], values: np.ndarray) -> int:
    """Digits after the point: as many as there were, and enough for 6 significant ones of the largest value."""
    numbers = [
        cell.strip(" \"'").lower().replace(",", ".").partition("e") for cell in cells if not math.isnan(_number(cell))
    ]
    there = max((len(mantissa.partition(".")[2]) - int(power or 0) for mantissa, _, power in numbers), default=0)
    largest = np.nanmax(np.abs(values), initial=0)
    return max(there, 5 - math.floor(math.log10(largest)) if largest else 0, 0)


def convert(recording: Recording, signal: np.ndarray, path: Path) -> None:
    """Writes a table with a column of times and a line of names and units."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    pairs = zip(recording.names, recording.units, strict=True)
    titles = [f"{name} ({unit})" if unit else name for name, unit in pairs]
    titles = ["time (s)", *(re.sub(r"[,;\t\r\n]", " ", title) for title in titles)]
    table = np.column_stack([np.arange(len(signal)) / recording.sampling_rate, signal])
    formats = ["%.9f", *(f"%.{_decimals([], values)}f" for values in signal.T)]
    np.savetxt(path, table, formats, delimiter, header=delimiter.join(titles), comments="", encoding="utf-8")
