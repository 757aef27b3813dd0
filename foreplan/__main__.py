"""``python -m foreplan`` and the ``foreplan`` script."""

from foreplan.cli.app import main

if __name__ == "__main__":
    main()
