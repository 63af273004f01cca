"""``fmfl`` and ``python -m fmfl``: ready for Ctrl-C before the first import that takes time."""

from fmfl import interrupt


def main() -> None:
    """Run the command line, see :mod:`fmfl.cli`."""
    interrupt.listen()
    from fmfl import cli

    cli.main()


if __name__ == "__main__":
    main()
