"""``python -m demo_tasks``: the whole demo on one machine."""

from __future__ import annotations

import sys

from demo_tasks.runner.cli import main

if __name__ == "__main__":
    sys.exit(main())
