"""``python -m turboquant_np``: the same as the command ``turboquant-np``."""

from .cli import main

raise SystemExit(main())
