"""Errors for the person who runs a program: printed as one message without a traceback. Any other is a bug."""


class UserError(Exception):
    """What happened, what was expected, and what to do about it."""


class PermanentError(UserError):
    """Starting the same command again would end in the same way, so no launcher retries it."""


class InputError(PermanentError, ValueError):
    """A flag, file or dataset is not as expected; the message names it, what was got and what was expected."""
