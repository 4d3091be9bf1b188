"""`python -m hsai.cli`, for where the `hsai` script is not on the path."""

from hsai.cli import run

run()
