"""The one exception class for mistakes of the person at the keyboard."""


class UserError(ValueError):
    """A mistake that the user can mend: bad input, a missing file, options that exclude each other.

    Commands print it as ``error: MESSAGE``, without a traceback, and exit with code 2. The message says in one go what
    is wrong, what was given, what is wanted and how to mend it.

    Args:
        message: What stands after ``error:``.
    """

    def __init__(self, message: str) -> None:
        # A data-loader worker's exception is raised again with the worker's traceback pasted into its message.
        if "Original Traceback (most recent call last)" in message:
            message = message.rsplit("UserError: ", 1)[-1]
        super().__init__(message.strip())
