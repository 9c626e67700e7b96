"""The one exception class for mistakes of the person at the keyboard."""


class UserError(ValueError):
    """A mistake that the user can mend: bad input, a missing file, options that exclude each other.

    Commands print it as ``error: MESSAGE``, without a traceback, and exit with code 2. The message says in one go what
    is wrong, what was given, what is wanted and how to mend it.
    """
