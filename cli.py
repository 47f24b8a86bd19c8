"""Runs the command line from a bare clone: `python cli.py recipes ls`. Installed, it is `linearize`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parent
    sys.path[:0] = [str(root), str(root / "kernels"), str(root / "eval")]
    from linearize.cli import main

    sys.exit(main())
