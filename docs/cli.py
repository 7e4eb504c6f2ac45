"""Write docs/cli.md, the list of every flag, and the presets in docs/recipes.md.

python docs/cli.py
"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.commands import COMMANDS, Command
from guided_diffusion.options.presets import PRESETS, flag_text

PAGE = Path(__file__).with_name("cli.md")
RECIPES = Path(__file__).with_name("recipes.md")
BEGIN, END = "<!-- presets: made by docs/cli.py -->\n", "<!-- end of the presets -->\n"
HEAD = """# Command line

Every flag of every command, made by `docs/cli.py` from the code. `guided-diffusion train` and
`python scripts/segmentation_train.py` are the same; so are the other pairs. Flags are accepted with
`-` for `_`, and may be shortened as long as they stay unique. Truth values are written `True` or
`False`. Flags marked *no effect* are accepted because the published commands have them. **Bold**
flags are those that `-h` shows. Every command also has `--help_all`, which shows all flags,
`--about`, which prints the version, torch and the device, and `--config FILE`, which
[reads flags from a YAML file](training.md#repeating-a-run). [Migration](migration.md) has the
differences from the published commands.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(section(name, command) for name, command in COMMANDS.items())


def section(name: str, command: Command) -> str:
    """One command: its scripts, and a table of flags for each option group."""
    scripts = " and ".join(f"`scripts/{script}.py`" for script in command.scripts)
    text = f"\n## {name}\n\n{command.summary} Also {scripts}.\n"
    seen: set[str] = set()
    for group in command.groups:
        rows = [
            row(group, entry, command.basic) for entry in fields(group) if entry.name not in seen
        ]
        seen |= {entry.name for entry in fields(group)}
        if rows:
            title = (group.__doc__ or "").split("\n")[0]
            text += f"\n{title}\n\n| flag | type | default | meaning |\n|---|---|---|---|\n"
            text += "".join(rows)
    return text


def row(group: type, entry: Any, basic: list[str]) -> str:
    """One flag: its spellings, type or choices, default and meaning."""
    info = entry.metadata
    flag = f"`--{entry.name}`" + (f", `{info['alias']}`" if info["alias"] else "")
    flag = f"**{flag}**" if entry.name in basic else flag
    kind = get_type_hints(group)[entry.name].__name__
    kind = " ".join(f"`{choice}`" for choice in info["choices"] if choice) or kind
    kind = " ".join(info["words"]) or kind
    default = "" if entry.default in ("", ()) else f"`{entry.default}`"
    meaning = info["help"] + (f"; *no effect: {info['dead']}*" if info["dead"] else "")
    return f"| {flag} | {kind} | {default} | {meaning.replace('|', chr(92) + '|')} |\n"


def recipes(page: str) -> str:
    """The page of recipes with its tables of presets made anew."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + presets() + END + rest.partition(END)[2]


def presets() -> str:
    """Two tables: what presets are for, and what they set for each command."""
    text = "\n| preset | purpose | source |\n|---|---|---|\n"
    for name, preset in PRESETS.items():
        text += f"| `{name}` | {preset.purpose} | {preset.source} |\n"
    text += "\n| preset | command | settings |\n|---|---|---|\n"
    for name, preset in PRESETS.items():
        for command, values in preset.parts.items():
            text += f"| {name} | {command} | `{flag_text(values)}` |\n"
    return text + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    RECIPES.write_text(recipes(RECIPES.read_text("utf-8")), encoding="utf-8")
