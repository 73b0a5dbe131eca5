"""`python -m lipdp` is the `lipdp` command."""

import sys

from lipdp.cli import main

if __name__ == "__main__":
    sys.exit(main())
