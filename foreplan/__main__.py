"""``python -m foreplan`` and the ``foreplan`` script: light, so that Ctrl-C is answered while the rest is loaded too."""

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
        print("error: interrupted", file=sys.stderr)
        sys.exit(_EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
