"""``python -m kvmnest``, and the command ``kvmnest``."""

import sys


def main() -> int:
    """Run the command line of this process; Ctrl-C during the imports is told as ever."""
    try:
        from kvmnest.cli.main import main as run
    except KeyboardInterrupt:
        print("kvmnest: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
