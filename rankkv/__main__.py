"""`python -m rankkv` is the command `rankkv`."""

from __future__ import annotations

from rankkv.cli import main

if __name__ == "__main__":
    main()
