"""``python -m backdoorscan``."""

from backdoorscan.cli import main

main()
