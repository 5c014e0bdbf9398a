"""The one exception for what a user can mend, and how it quotes others."""

_LONGEST = 200  # characters of what a library tells of a file


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do next. Commands exit with 2."""


def reason(error: BaseException) -> str:
    """What a library's error tells, as one short line: it may quote the file."""
    return printable((str(error).strip() or repr(error)).splitlines()[0])[:_LONGEST]


def printable(text: str) -> str:
    """A text out of a file without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
