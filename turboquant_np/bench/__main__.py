"""``python -m turboquant_np.bench``: the same as ``turboquant-np bench``."""

import sys

from ..cli import main

raise SystemExit(main(["bench", *sys.argv[1:]]))
