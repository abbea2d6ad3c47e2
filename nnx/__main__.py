"""`python -m nnx` is the command `nnx`."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C while the command is being imported is no traceback either."""
    try:
        from nnx.cli import main as command

        return command()
    except KeyboardInterrupt:
        print("nnx: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
