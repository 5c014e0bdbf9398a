"""The one exception for what a user can mend, and how it quotes others."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_LONGEST = 200  # characters of what a library tells of a file


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do next. Commands exit with 2."""


def reason(error: BaseException) -> str:
    """What a library's error tells, as one short line: it may quote the file."""
    return printable((str(error).strip() or repr(error)).splitlines()[0])[:_LONGEST]


def refusal(error: BaseException) -> str:
    """What the system refused, "No space left on device", out of the words that libraries put around it."""
    number = re.search(r"(?:os_error_code='|\[Errno )(\d+)", str(error))
    return os.strerror(int(number[1])) if number else reason(error)


@contextlib.contextmanager
def writing(folder: str | Path, refused: type[Exception] = OSError) -> Iterator[None]:
    """Raises `UserError` where the system refuses to write in a folder: a full disk, no permission."""
    try:
        yield
    except UserError:
        raise
    except refused as error:
        raise UserError(
            f"cannot write in {folder}: {refusal(error)}; free space or choose another folder, then give the same "
            "command again: it goes on from what is saved there"
        ) from error


def printable(text: str) -> str:
    """A text out of a file without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
