"""Write what follows from docs/tour.md: the notebook tour.ipynb, and the pictures in docs/tour/.

python docs/tour.py
"""

import json
import re
import sys
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE = Path(__file__).with_name("tour.md")
NOTEBOOK = PAGE.with_suffix(".ipynb")
CODE = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"^!\[[^\]]*\]\((tour/[\w-]+\.png)\)\n\n?", re.MULTILINE)


def cells(text: str) -> list[tuple[str, str]]:
    """The page as cells, ``markdown`` and ``code`` in turn; pictures are left out of the text."""
    kinds = ("markdown", "code")
    parts = [PICTURE.sub("", part).strip() for part in CODE.split(text)]
    return [(kinds[place % 2], part) for place, part in enumerate(parts) if part]


def notebook(text: str) -> str:
    """The notebook, not run, in format 4.5."""
    found = []
    for number, (kind, source) in enumerate(cells(text)):
        run = {"execution_count": None, "outputs": []} if kind == "code" else {}
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, **run}
        found.append({**cell, "source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def draw(text: str) -> None:
    """Run the code, and save the figure of each block as the picture that follows it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    names: dict[str, object] = {}
    _, *parts = CODE.split(text)
    for code, after in zip(parts[::2], parts[1::2], strict=True):
        exec(compile(code, PAGE.name, "exec"), names)
        for number, name in zip(plt.get_fignums(), PICTURE.findall(after), strict=True):
            content, picture = BytesIO(), PAGE.parent / name
            picture.parent.mkdir(exist_ok=True)
            plt.figure(number).savefig(content, dpi=110)
            with Image.open(content) as image:
                small = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
                small.save(picture, optimize=True)
        plt.close("all")


if __name__ == "__main__":
    page = PAGE.read_text("utf-8")
    NOTEBOOK.write_text(notebook(page), encoding="utf-8")
    draw(page)
