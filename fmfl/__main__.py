"""`fmfl` and `python -m fmfl`: ready for Ctrl-C before the first import that takes time."""

from fmfl.study import interrupt


def main() -> None:
    """Run the command line, see `study.cli`."""
    interrupt.listen()
    from fmfl.study import cli

    cli.main()


if __name__ == "__main__":
    main()
