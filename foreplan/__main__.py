"""``python -m foreplan`` and the ``foreplan`` script: light, so that Ctrl-C is answered while all else is loaded."""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXIT_INTERRUPTED = 130
"""As in `foreplan.cli.command`, which may not be there yet."""


def main() -> None:
    """Run the program."""
    try:
        from foreplan.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(_EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
