"""Write the reference of docs/python.md anew, from signatures and docstrings.

python docs/api.py

Between ``<!-- NAME -->`` and ``<!-- end -->`` stands what the docstring of NAME says.
"""

import inspect
import re
import sys
import textwrap
from pathlib import Path
from pkgutil import resolve_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PAGE = Path(__file__).with_name("python.md")
BLOCK = re.compile(r"<!-- (guided_diffusion\.[\w.:]+) -->\n.*?<!-- end -->", re.DOTALL)
ROLE = re.compile(r":\w+:`~?(?:guided_diffusion\.)?(?:[a-z_]+\.)*([\w.]+)`")
SECTION = re.compile(r"(Args|Attributes|Returns|Raises):\n", re.MULTILINE)
TITLES = {"Args": "", "Attributes": "", "Returns": "Returns ", "Raises": "Raises "}


def refilled(text: str) -> str:
    """The page, with every block made anew."""
    return BLOCK.sub(lambda found: block(found[1]), text)


def block(name: str) -> str:
    """What stands for one name, its marks included."""
    return f"<!-- {name} -->\n{entry(name)}\n<!-- end -->"


def entry(name: str) -> str:
    """Signature and docstring, as Markdown."""
    what = resolve_name(name)
    shown = name.rpartition(":")[2]
    text = inspect.getdoc(what) or ""
    assert text, f"{name} has no docstring"
    return f"**`{shown}{signature(what)}`**\n\n{body(text)}"


def signature(what: object) -> str:
    """The parameters with their defaults, without types; nothing for a property."""
    if isinstance(what, property):
        return ""
    parts, keyword_only = [], False
    for parameter in inspect.signature(what).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = parameter.default
        value = getattr(default, "__name__", None) or repr(default)
        value = "..." if len(value) > 30 else value
        has = default is not parameter.empty
        parts.append(f"{star}{parameter.name}{f'={value}' if has else ''}")
    return f"({', '.join(parts)})"


def body(text: str) -> str:
    """A docstring as Markdown: paragraphs, and a list for each of its sections."""
    head, *sections = SECTION.split(text)
    parts = [paragraph(part) for part in head.strip().split("\n\n") if part]
    for kind, content in zip(sections[::2], sections[1::2], strict=True):
        items, _, after = content.partition("\n\n")
        parts.append(listed(kind, textwrap.dedent(items)))
        parts += [paragraph(part) for part in after.strip().split("\n\n") if part]
    return "\n\n".join(parts)


def listed(kind: str, items: str) -> str:
    """The items of a section, each on lines of its own, further ones indented."""
    if kind == "Returns":
        return paragraph(f"Returns: {items}")
    joined = re.sub(r"\n +", " ", items).splitlines()
    lines = []
    for name, _, meaning in (line.partition(": ") for line in joined):
        lines.append(paragraph(f"* {TITLES[kind]}`{name}`: {meaning}", indent="  "))
    return "\n".join(lines)


def paragraph(text: str, indent: str = "") -> str:
    """Markdown in place of the marks of a docstring, wrapped."""
    text = ROLE.sub(r"`\1`", text).replace("``", "`")
    text = re.sub(r"` s\b", "`s", " ".join(text.split()))
    return textwrap.fill(
        text, 110, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    PAGE.write_text(refilled(PAGE.read_text("utf-8")), encoding="utf-8")
