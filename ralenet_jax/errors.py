"""The one exception for what a user can mend."""


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do next. Commands exit with 2."""
