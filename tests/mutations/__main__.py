"""python -m tests.mutations [NAME...]: ends with 1 unless the tests notice every mutation."""

import sys

from tests.mutations.runner import main

sys.exit(1 if main(sys.argv[1:]) else 0)
