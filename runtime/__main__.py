"""`python -m runtime`, and the command xlora-run."""

import sys

from runtime.huge_pages import restart_for_huge_pages


def main() -> int:
    """The command line, in a process that may have huge pages."""
    restart_for_huge_pages()
    from runtime.cli import main as run  # nothing is imported twice

    return run()


if __name__ == "__main__":
    sys.exit(main())
