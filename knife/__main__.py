"""The program `knife`, also as `python -m knife`: Ctrl-C ends it in order from its first import on."""

import signal
import sys


def main() -> None:
    """Run the command line."""
    try:
        from knife.cli import main as run
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    run()


if __name__ == "__main__":
    main()
