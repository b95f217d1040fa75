"""``saw ls``: list workspaces; a short name of ``saw workspace list``."""

from __future__ import annotations

import argparse

from saw.cli.workspace import add_filters, list_workspaces


def main(argv: list[str]) -> int:
    """Run ``saw ls``."""
    parser = argparse.ArgumentParser(prog="saw ls", description="List workspaces: all, or those that filters choose.")
    add_filters(parser)
    return list_workspaces(parser.parse_args(argv))
