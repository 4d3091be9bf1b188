"""`python -m hsai.cli`, for where the `hsai` script is not on the path."""

import sys

from hsai.cli import main

sys.exit(main())
