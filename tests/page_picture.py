"""A picture of the page of a running server: an answer with documents, and one without beside it.

    rag2 serve runs/demo --name almanac
    python tests/page_picture.py "What creature represents Baeman Cross?" docs/page.png

`--one` leaves out the closed book; `--dark` and `--width 390` show it as others see it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

from asking import ask, visit
from browser import browse


def main() -> None:
    """Ask and take the picture."""
    arguments = argparse.ArgumentParser(description="A picture of the page of a running server.")
    arguments.add_argument("question")
    arguments.add_argument("picture", type=Path)
    arguments.add_argument("--address", default="http://127.0.0.1:8000")
    arguments.add_argument("--one", action="store_true", help="without the closed book beside it")
    arguments.add_argument("--dark", action="store_true")
    arguments.add_argument("--width", type=int, default=1280)
    arguments.add_argument("--height", type=int, default=940)
    given = arguments.parse_args()
    with browse() as page:
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        visit(page, given.address)
        page.resize(given.width, given.height, dark=given.dark)
        if not given.one:
            page.click("#compare")
        ask(page, given.question)
        page.look("document.activeElement.blur()")
        page.look("scrollTo(0, 0)")
        page.picture(given.picture, whole=False)


if __name__ == "__main__":
    main()
