"""`python -m nnx` is the command `nnx`."""

import sys

from nnx.cli import main

if __name__ == "__main__":
    sys.exit(main())
