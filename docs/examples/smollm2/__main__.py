"""`python docs/examples/smollm2 ...` from anywhere, or `python -m smollm2 ...` beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from smollm2.command import main

if __name__ == "__main__":
    sys.exit(main())
