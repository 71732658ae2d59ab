"""Command line: `python -m fusedstep info`."""

from __future__ import annotations

import argparse


def main() -> None:
    """Runs the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m fusedstep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print what belongs into a bug report")
    parser.parse_args()
    from fusedstep.info import report

    print(report())


if __name__ == "__main__":
    main()
