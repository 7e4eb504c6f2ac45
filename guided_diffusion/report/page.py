"""The page on which cases are shown: one self-contained file, without network or framework.

The template ``report.html`` beside this file is filled with tables, charts and cases, and takes its
style and its script from ``report.css`` and ``report.js``. Pages of scored masks, of masks without
a truth, and of two folders compared are all made here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from guided_diffusion.report.tables import number

REPORT = "report.html"
COMPARISON = "comparison.html"
HERE = Path(__file__).parent
LAYERS = {"photo": "Image", "truth": "Truth", "fused": "Fused", "uncertainty": "Uncertainty"}
TABLES = ("scores.csv", "masks.csv", "components.csv", "patients.csv", "predictions.csv")
"""Files of a result folder that its page links, those that are there."""


class Column(NamedTuple):
    """A column of the table of cases.

    Attributes:
        key: of the values of a row.
        label: its heading.
        digits: behind the point; None for text.
        falling: whether the first click sorts it from the largest to the smallest.
        by_size: whether values are sorted without their sign, which is shown.
    """

    key: str
    label: str
    digits: int | None = 3
    falling: bool = False
    by_size: bool = False


class Shown(NamedTuple):
    """A case, or one class of it.

    Attributes:
        name: of the case.
        values: the numbers of its row by column; None where one is unknown.
        views: its pictures, one beside the other: :class:`~.thumbnails.Layers` as a dictionary,
            or an :func:`~.thumbnails.overlay_view`; with ``label`` where there are several.
        links: files to open by label, relative to the page.
        of_class: its class; empty where there is only one.
    """

    name: str
    values: Mapping[str, float | int | None]
    views: Sequence[Mapping[str, Any]]
    links: Mapping[str, str]
    of_class: str = ""


Strip = tuple[str, Sequence[tuple[int, str]]]
"""A row of pictures: its heading, and the places of its cases with a note on each."""
Section = tuple[str, str, str]
"""A part of the page: its anchor, its heading and its content as HTML."""


@dataclass(frozen=True)
class Page:
    """Everything on a page.

    Attributes:
        kind: what has written it, one word.
        kicker: the line above the title, which says what page this is.
        title: the heading.
        subtitle: the line below it.
        headline: key figures, as HTML.
        columns: of the table of cases, after name and class.
        cases: its rows.
        order: the key of the column by which rows are sorted at first.
        range: the key of the column whose values can be filtered.
        before: sections above the cases.
        after: sections below them.
        strips: rows of pictures above the table.
        layers: keys of :data:`LAYERS` that can be toggled.
        classes: to choose from.
        links: files beside the page, by label.
        run: what was run: labels with texts or with settings.
        notes: on how to read the numbers.
    """

    kind: str
    kicker: str
    title: str
    subtitle: str
    columns: Sequence[Column]
    cases: Sequence[Shown]
    order: str
    range: str
    headline: str = ""
    before: Sequence[Section] = ()
    after: Sequence[Section] = ()
    strips: Sequence[Strip] = ()
    layers: Sequence[str] = tuple(LAYERS)
    classes: Sequence[str] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Format the page as HTML."""
        after = [*self.after, ("run", "What was run", definitions(self.run))]
        columns = {column.key: column for column in self.columns}
        pairs = max((len(case.views) for case in self.cases), default=1) > 1
        parts = {
            "kind": self.kind,
            "kicker": escape(self.kicker),
            "title": escape(self.title),
            "subtitle": escape(self.subtitle),
            "body": "no-uncertainty pairs" if pairs else "no-uncertainty",
            "style": _file("report.css"),
            "script": _file("report.js"),
            "contents": self._contents(),
            "headline": self.headline,
            "before": "".join(map(section, self.before)),
            "after": "".join(map(section, after)),
            "layers": "".join(map(_toggle, self.layers)),
            "keys": " ".join(f"<kbd>{LAYERS[key][0].lower()}</kbd>" for key in self.layers),
            "range": escape(columns[self.range].label),
            "classes": _class_choice(self.classes),
            "head": "".join(map(_head, self._all_columns())),
            "rows": "".join(self._row(index, self.cases[index]) for index in self._ordered()),
            "notes": "".join(f"<li>{escape(note)}</li>" for note in self.notes),
            "data": self._data(ascending=not columns[self.order].falling),
        }
        return re.sub(r"<!--\{(\w+)\}-->", lambda match: parts[match[1]], _file("report.html"))

    def _all_columns(self) -> list[Column]:
        classed = [Column("class", "Class", None)] if self.classes else []
        return [Column("name", "Case", None), *classed, *self.columns]

    def _contents(self) -> str:
        """The links to the sections, and to the files beside the page."""
        places = [(anchor, heading) for anchor, heading, _ in self.before]
        places += [("cases", "Cases"), *((anchor, heading) for anchor, heading, _ in self.after)]
        places.append(("run", "What was run"))
        inside = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in places)
        beside = "".join(
            f'<a href="{escape(file)}">{escape(label)}</a>' for label, file in self.links.items()
        )
        return f"{inside}<span>{beside}</span>" if beside else inside

    def _ordered(self) -> list[int]:
        """The places of the cases in the order of the column that rows are sorted by at first."""
        (column,) = (column for column in self.columns if column.key == self.order)

        def key(index: int) -> tuple[bool, float]:
            value = self.cases[index].values.get(self.order)
            number = 0 if value is None else abs(value) if column.by_size else value
            return value is None, -number if column.falling else number

        return sorted(range(len(self.cases)), key=key)

    def _row(self, index: int, case: Shown) -> str:
        """Format a row of the table; its cells hold the full values."""
        cells = []
        for column in self._all_columns()[1:]:
            if column.key == "class":
                text = full = escape(case.of_class)
            else:
                value = case.values.get(column.key)
                full = "" if value is None else str(value)
                text = number(value, column.digits or 0, signed=column.by_size)
            cells.append(
                f'<td data-key="{column.key}" data-value="{full}" '
                f'data-label="{escape(column.label)}"{_kind(column)}>{text}</td>'
            )
        name = escape(case.name)
        return (
            f'<tr data-index="{index}" tabindex="-1" aria-selected="false"><td class="thumb"></td>'
            f'<th scope="row" data-key="name" data-value="{name}" title="{name}">{name}</th>'
            f"{''.join(cells)}</tr>"
        )

    def _data(self, *, ascending: bool) -> str:
        """Format the data of the page's script as JSON that no case's name can terminate."""
        data: dict[str, Any] = {
            "cases": [
                {
                    "name": case.name,
                    "class": case.of_class,
                    "views": list(case.views),
                    "links": dict(case.links),
                }
                for case in self.cases
            ],
            "strips": self.strips,
            "sort": {"key": self.order, "ascending": ascending},
            "range": self.range,
        }
        text = json.dumps(data, separators=(",", ":"))
        return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def section(part: Section) -> str:
    """Format a section; one without content is left out."""
    anchor, heading, content = part
    if not content:
        return ""
    title = f'<h2 id="h-{anchor}">{escape(heading)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="h-{anchor}">{title}{content}</section>'


def _head(column: Column) -> str:
    falling = " data-down" * column.falling + " data-size" * column.by_size
    return (
        f'<th scope="col" data-key="{column.key}" data-label="{escape(column.label)}"'
        f'{_kind(column)}{falling} aria-sort="none">'
        f'<button type="button">{escape(column.label)}</button></th>'
    )


def _kind(column: Column) -> str:
    return " data-text" if column.digits is None else ""


def _toggle(layer: str) -> str:
    pressed = "false" if layer == "uncertainty" else "true"
    return (
        f'<button type="button" data-layer="{layer}" aria-pressed="{pressed}">'
        f'<i class="{layer}"></i>{LAYERS[layer]}</button>'
    )


def _class_choice(classes: Sequence[str]) -> str:
    """Format the control that chooses a class; empty where there is only one."""
    if not classes:
        return ""
    options = "".join(f"<option>{escape(name)}</option>" for name in classes)
    return (
        f'<label>Class <select id="class"><option value="">all</option>{options}</select></label>'
    )


def definitions(run: Mapping[str, Any]) -> str:
    """Format labels with their texts, or their settings, as a list; empty ones are left out."""
    entries = "".join(
        f"<dt>{escape(label)}</dt><dd>{_settings(text)}</dd>" for label, text in run.items() if text
    )
    return f'<dl class="run">{entries}</dl>' if entries else ""


def _settings(value: object) -> str:
    if not isinstance(value, Mapping):
        return escape(str(value))
    items = (
        f"<li><span>{escape(str(name))}</span> {escape(_plain(setting))}</li>"
        for name, setting in value.items()
    )
    return f"<ul>{''.join(items)}</ul>"


def _plain(setting: object) -> str:
    return '""' if setting == "" else str(setting)


def tables_beside(folder: Path, names: Iterable[str] = TABLES) -> dict[str, str]:
    """The tables in a result folder, to be linked."""
    return {name: name for name in names if (folder / name).exists()}


def pictures_beside(folder: Path, name: str, *, end: str = "", base: str = "") -> dict[str, str]:
    """The full-size pictures of a case beside its page, by label; ``base`` leads to the folder."""
    kinds = {
        "overlay": "overlay.png",
        "mask": "mask.png",
        "soft mask": f"output_ens{end}.png",
        "uncertainty": "uncertainty.png",
        "members": "members.gif",
    }
    files = {label: f"{name}_{kind}" for label, kind in kinds.items()}
    return {label: base + file for label, file in files.items() if (folder / file).exists()}
