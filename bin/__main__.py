"""``penstock``: the commands."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script. Without the server's packages it says how to get them."""
    try:
        from penstock.bin.cli import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("penstock"):
            raise
        sys.exit(f"penstock: {error.name} is missing; this command needs: pip install 'penstock[server]'")
    cli(prog_name="penstock")


if __name__ == "__main__":
    main()
