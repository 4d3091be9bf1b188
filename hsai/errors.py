"""The one exception for mistakes that the person at the keyboard can mend.

Everything in hsai that blames its input (a config, a file, a prompt) raises `InputError` with one line that names the
offending value and what would be valid. The command line prints that line and exits with status 2; any other exception
is a defect of ours and keeps its traceback.
"""


class InputError(ValueError):
    """A user's input cannot be used; `str(error)` is one line: the offending value, and what would be valid."""
