"""Draws docs/screenshot.svg: the demo's network, scanned by the program as users run it.

Usage: python docs/screenshot.py
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

from backdoorscan.demo import make_demo

COLUMNS = 100
PICTURE = Path(__file__).with_suffix(".svg")


def main() -> None:
    """Train, scan, draw."""
    with tempfile.TemporaryDirectory() as folder:
        files = make_demo(Path(folder) / "demo")
        arguments = ["scan", files.model.name, "--valid", files.clean.name]
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "backdoorscan", "--color", "always", *arguments],
            cwd=files.model.parent,
            env={**os.environ, "COLUMNS": str(COLUMNS), "BACKDOORSCAN_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 1:
        raise SystemExit(f"The scan ended with {done.returncode}: {done.stderr}")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ backdoorscan {' '.join(arguments)}", style="bold"))
    console.print(Text.from_ansi(done.stdout.rstrip()))
    console.print(Text(done.stderr.rstrip(), style="dim"))
    # The fonts that rich names lie on a server of others: a picture that loads nothing shows everywhere.
    format = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    drawn = console.export_svg(title="backdoorscan", code_format=format, unique_id="backdoorscan")
    PICTURE.write_text("\n".join(line.rstrip() for line in drawn.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
