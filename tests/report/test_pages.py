"""The page of every case: unscored, of two folders, with very many cases, on paper, by keyboard."""

import json
import re

import numpy as np
import pytest
from browser import needs_browser, printed, probed
from PIL import Image

from guided_diffusion.report import report, training_charts
from guided_diffusion.report.canvas import soft_png
from guided_diffusion.report.comparison import comparison_page, write_comparison
from guided_diffusion.report.page import Column, Page, Shown, definitions
from guided_diffusion.report.pictures import overlay
from guided_diffusion.report.report import write_report
from guided_diffusion.report.thumbnails import overlay_view
from guided_diffusion.report.unscored import is_current, unscored_page, write_unscored
from guided_diffusion.scoring.compare import compare_folders
from guided_diffusion.scoring.evaluate import evaluate_all

SIZE = 48


def disc(radius, size=SIZE):
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    return (x**2 + y**2 <= radius**2).astype(np.float32)


def save(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(soft_png(mask)).save(path)


def write_case(folder, name, radius, *, spread=1.0, truth=True):
    """The files of a case as sampling writes them: discs around a radius."""
    members = [disc(radius), disc(radius + spread)]
    fused = np.mean(members, axis=0)
    for index, member in enumerate(members):
        save(folder / f"{name}_output{index}.png", member)
    save(folder / f"{name}_output_ens.png", fused)
    save(folder / f"{name}_mask.png", fused >= 0.5)
    save(folder / f"{name}_uncertainty.png", np.abs(members[0] - members[1]))
    true = disc(12) if truth else None
    drawn = overlay(np.full((3, SIZE, SIZE), 0.4), true, fused, fused / 4, name=name)
    Image.fromarray(drawn).save(folder / f"{name}_overlay.png")


def row(name, disagreement, uncertainty=0.01, area=300, members=2, empty=0):
    """A row of predictions.csv."""
    numbers = {"disagreement": disagreement, "uncertainty": uncertainty, "area": area}
    return {"name": name, **numbers, "members": members, "empty_members": empty, "seconds": 1}


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def names_of(text):
    return re.findall(r'<tr data-index="\d+".*?data-value="([^"]*)"', text)


# --------------------------------------------------------------------------------- without a truth


@pytest.fixture(scope="module")
def unscored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unscored")
    rows = [row(f"{k}", k / 10, area=100 * k) for k in range(4)]
    for k in range(4):
        write_case(folder, f"{k}", 8 + k, truth=False)
    (folder / "predictions.csv").write_text("name\n")
    return folder, rows


def test_the_most_doubtful_cases_come_first(unscored):
    folder, rows = unscored
    page = unscored_page(folder, rows, {"Seed": "10"})
    text = page.text()
    assert names_of(text) == ["3", "2", "1", "0"]
    assert 'content="guided-diffusion sampling"' in text
    assert 'data-layer="truth"' not in text and 'data-layer="fused"' in text
    assert 'href="predictions.csv"' in text
    view = data_of(text)["cases"][0]["views"][0]
    assert view["image"].startswith("data:image/jpeg") and view["fused"].count("M") == 1
    assert view["truth"] == "" and view["uncertainty"].startswith("data:image/png")


def test_members_may_be_absent(unscored, tmp_path):
    rows = unscored[1]
    write_case(tmp_path, "3", 9, truth=False)
    for path in tmp_path.glob("*_output[0-9].png"):
        path.unlink()
    (view,) = unscored_page(tmp_path, rows[3:], {}).cases[0].views
    assert view["fused"] and view["image"]


def test_a_damaged_mask_shows_the_overlay_and_an_absent_one_nothing(unscored, tmp_path):
    write_case(tmp_path, "0", 9, truth=False)
    (tmp_path / "0_output_ens.png").write_bytes(b"no picture")
    cases = unscored_page(tmp_path, [row("0", 0.2), row("gone", 0.1)], {}).cases
    assert cases[0].views[0]["overlay"] == "0_overlay.png"
    assert cases[1].views == [{}] and cases[1].links == {}


def test_single_members_are_in_the_order_of_their_uncertainty(unscored):
    rows = [row(f"{k}", 0, uncertainty=k / 100, members=1) for k in range(4)]
    page = unscored_page(unscored[0], rows, {})
    assert page.order == "uncertainty" and names_of(page.text())[0] == "3"
    plain = [row(f"{k}", 0, uncertainty=0, members=1) for k in range(3)]
    assert unscored_page(unscored[0], plain, {}).text()


def test_of_a_volume_the_most_doubtful_slice_is_shown(unscored):
    rows = [row("a_slice000", 0.1), row("a_slice001", 0.4, area=5), row("b_slice000", 0.2)]
    volumes = {entry["name"]: entry["name"][0] for entry in rows}
    page = unscored_page(unscored[0], rows, {}, volumes=volumes)
    assert [case.name for case in page.cases] == ["a_slice001", "b_slice000"]
    assert page.cases[0].values["slices"] == 2 and page.cases[0].values["voxels"] == 305
    assert "3 slices, of each volume the most doubtful one" in page.text()


def test_the_page_is_written_anew_only_once_something_has_been_drawn(unscored):
    folder, rows = unscored
    (folder / "report.html").unlink(missing_ok=True)
    assert not is_current(folder)
    write_unscored(folder, rows, {})
    assert is_current(folder)
    (folder / "predictions.csv").touch()
    assert not is_current(folder)


# ---------------------------------------------------------------------------------- very many cases


def test_cases_beyond_those_inside_the_page_show_their_overlays(tmp_path, monkeypatch):
    for k in range(6):
        write_case(tmp_path / "pred", f"{k}", 7 + k)
        save(tmp_path / f"gt/{k}.png", disc(12))
    evaluation = evaluate_all(tmp_path / "pred", tmp_path / "gt")
    monkeypatch.setattr(report.choose_pictured, "__defaults__", (3,))
    views = [case["views"][0] for case in data_of(report.page(evaluation, {}))["cases"]]
    assert sum("overlay" in view for view in views) == 3
    view = next(view for view in views if "overlay" in view)
    assert view["panels"] == 4 and (view["width"], view["height"]) == (320, 320)
    left, top, step = view["grid"]
    assert view["size"] == [2 * left + 3 * step + 320, top + 320 + 34]
    assert overlay_view(tmp_path / "pred", "none") == {}


def made_page(number):
    """A page of many cases whose pictures are all inside it, with little else."""
    outline = "M" + " ".join(f"{x},{(7 * x) % 90}" for x in range(60)) + "z"
    view = {"width": 90, "height": 90, "image": "", "truth": outline, "fused": outline}
    generator = np.random.default_rng(0)
    dice = generator.random(number)
    cases = [
        Shown(f"case {k:05d}", {"dice": float(dice[k]), "hd95": 3.2}, [view], {})
        for k in range(number)
    ]
    columns = [Column("dice", "Dice"), Column("hd95", "HD95, px", 1)]
    return Page("scoring", "Report", "many", "", columns, cases, order="dice", range="dice").text()


@needs_browser
def test_thumbnails_of_2000_cases_are_made_when_they_are_seen(tmp_path):
    path = tmp_path / "many.html"
    path.write_text(made_page(2000), "utf-8")
    found = probed(
        path,
        """
        const count = () => document.querySelectorAll("#list .thumb svg").length;
        const pause = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 10)));
        const box = document.getElementById("list-box"), seen = [];
        for (const top of [0, 30000, 60000]) {
          box.scrollIntoView({behavior: "instant"});
          box.scrollTop = top;
          for (let k = 0; k < 100 && count() <= (seen.at(-1) ?? 0); k++) await pause();
          await pause();
          seen.push(count());
        }
        const {loadEventStart} = performance.getEntriesByType("navigation")[0];
        const rows = document.querySelectorAll("#list tbody tr").length;
        return {seen, rows, opened: loadEventStart};
        """,
        tmp_path / "profile",
    )
    assert found["rows"] == 2000
    assert found["opened"] < 20_000, "2 seconds on a quiet machine, with a margin for a busy one"
    assert 0 < found["seen"][0] < found["seen"][1] < found["seen"][2] < 300


# ---------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two folders of the same five cases: one of them is worse in the second, one is better."""
    place = tmp_path_factory.mktemp("compared")
    for k in range(5):
        save(place / f"gt/{k}.png", disc(12))
        write_case(place / "one", f"{k}", 10)
        write_case(place / "two", f"{k}", {1: 6, 2: 11.6}.get(k, 10))
    first, second = (evaluate_all(place / name, place / "gt") for name in ("one", "two"))
    found = compare_folders(first, second)
    return first, second, found, write_comparison(first, second, found, {})


def test_pairs_that_changed_most_come_first(compared):
    first, second, _, path = compared
    text = path.read_text("utf-8")
    assert path.name == "comparison.html" and names_of(text)[:2] == ["1", "2"]
    before, after = ({r.name: r.dice for r in e.scores[""].rows} for e in (first, second))
    changes = re.findall(r'data-key="change" data-value="([^"]*)"', text)
    assert float(changes[0]) == after["1"] - before["1"] < 0 < float(changes[1])
    data = data_of(text)
    assert [heading for heading, _ in data["strips"]] == ["Fell most", "Rose most"]
    views = data["cases"][0]["views"]
    assert [view["label"].split(",")[0] for view in views] == ["one", "two"]
    assert data["cases"][0]["links"]["overlay, first"] == "../one/0_overlay.png"
    assert 'href="../one/scores.csv"' in text and "Dice against Dice" in text
    assert text.count('class="dot"') == 5 and "One" not in text


def test_every_difference_of_the_comparison_is_on_its_page(compared):
    *_, found, path = compared
    text = path.read_text("utf-8").replace("\N{MINUS SIGN}", "-")
    dice = found["measures"]["dice"]
    assert f"{dice['difference']:+.4f}" in text
    assert f"{dice['low']:+.4f} to {dice['high']:+.4f}" in text


def test_overlays_of_the_first_folder_are_found_from_the_second(compared, monkeypatch):
    first, second, found, _ = compared
    monkeypatch.setattr("guided_diffusion.report.comparison.MOST_PICTURES", 0)
    views = comparison_page(first, second, found, {}).cases[0].views
    assert [view["overlay"] for view in views] == ["../one/0_overlay.png", "0_overlay.png"]


# --------------------------------------------------------------------------------- what was run


def test_settings_are_listed_one_by_one():
    text = definitions({"Seed": "10", "Flags": {"lr": 1e-4, "name": "", "x": "<b>"}, "None": {}})
    assert "<dt>Seed</dt><dd>10</dd>" in text and "None" not in text
    assert "<li><span>lr</span> 0.0001</li>" in text and '<span>name</span> ""' in text.replace(
        "&quot;", '"'
    )
    assert "&lt;b&gt;" in text and definitions({"None": ""}) == ""


def test_training_curves_are_drawn_from_the_log(tmp_path):
    log = tmp_path / "progress.csv"
    rows = [f"{10 * k},{2.0**-k},{0.5 + k / 40},1e-4" for k in range(1, 9)]
    log.write_text("\n".join(["step,loss,val_dice,lr", *rows]) + "\n")
    ((anchor, heading, content),) = training_charts.training_section(log)
    assert (anchor, heading) == ("training", "Training") and content.count("<figure>") == 2
    assert "best 0.700" in content and "Learning rate" not in content, "it never changes"
    assert training_charts.training_section(tmp_path / "none.csv") == []
    assert training_charts.training_section(None) == []


def test_an_axis_of_values_that_span_a_factor_of_eight_is_logarithmic():
    axis = training_charts.value_axis("loss", [0.004, 0.3])
    assert axis.logarithmic and (axis.low, axis.high) == (0.002, 0.5)
    assert axis.share(0.002) == 0 and axis.share(0.5) == 1
    assert axis.share((0.002 * 0.5) ** 0.5) == pytest.approx(0.5)
    assert not training_charts.value_axis("loss", [0.1, 0.3]).logarithmic


# ------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Ninety scored cases, enough for several pages of paper."""
    place = tmp_path_factory.mktemp("scored")
    for k in range(90):
        save(place / f"pred/a_rather_long_name_{k:03d}_output0.png", disc(8 + k / 20))
        save(place / f"pred/a_rather_long_name_{k:03d}_output1.png", disc(9 + k / 20))
        save(place / f"gt/a_rather_long_name_{k:03d}.png", disc(12))
    evaluation = evaluate_all(place / "pred", place / "gt")
    settings = {f"flag_{k}": k for k in range(40)}
    return write_report(evaluation, {"Command": "python x", "Flags": settings})


def test_the_page_can_be_used_without_a_mouse_and_read_aloud(scored):
    text = scored.read_text("utf-8")
    assert 'role="grid"' in text and text.count('tabindex="-1"') == 90
    assert text.count('aria-selected="false"') == 90 and 'aria-sort="none"' in text
    figures = re.findall(r"<svg viewBox[^>]*>", text)
    assert figures and all('role="img"' in drawn and "aria-label=" in drawn for drawn in figures)
    assert 'href="scores.csv"' in text and 'href="masks.csv"' in text
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    paper = style[style.index("@media print") :]
    assert "table-header-group" in paper and "break-inside: avoid" in paper
    assert "@media screen and (prefers-color-scheme: dark)" in style


@needs_browser
def test_keys_move_through_the_rows_and_a_filter_without_hits_clears_the_case(scored, tmp_path):
    found = probed(
        scored,
        """
        const find = what => document.querySelector(what), seen = {};
        const press = key => document.activeElement.dispatchEvent(
          new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
        const at = () => [find("#name").textContent, document.activeElement.dataset.index];
        const stops = () => document.querySelectorAll('#list tbody tr[tabindex="0"]').length;
        find('#list tbody tr[tabindex="0"]').focus();
        seen.first = at(); press("ArrowDown"); seen.second = at();
        press("End"); seen.last = at(); press("Home"); seen.home = at(); seen.stops = stops();
        seen.title = find("#stage svg title").textContent;
        seen.selected = document.querySelectorAll('[aria-selected="true"]').length;
        find("#search").value = "nothing like this";
        find("#search").dispatchEvent(new Event("input", {bubbles: true}));
        seen.none = [...["#stage", "#name", "#links"].map(what => find(what).textContent),
          document.querySelectorAll('[aria-selected="true"]').length];
        find("#search").value = "";
        find("#search").dispatchEvent(new Event("input", {bubbles: true}));
        seen.again = find("#name").textContent;
        return seen;
        """,
        tmp_path,
    )
    assert found["first"] == found["home"] == ["a_rather_long_name_000", "0"]
    assert found["second"] == ["a_rather_long_name_001", "1"]
    assert found["last"][1] != "0" and (found["stops"], found["selected"]) == (1, 1)
    assert "image" in found["title"] and "a_rather_long_name_000" in found["title"]
    assert found["none"] == ["No case fits the filter.", "", "", 0]
    assert found["again"] == "a_rather_long_name_000"


CUT = """
const cut = [], width = innerWidth, root = document.documentElement;
const box = document.getElementById("list-box");
if (root.scrollWidth > root.clientWidth) cut.push(["page", root.scrollWidth]);
if (box.scrollWidth > box.clientWidth) cut.push(["list", box.scrollWidth]);
for (const cell of document.querySelectorAll("td, thead th")) {
  const {left, right} = cell.getBoundingClientRect(), head = cell.closest("thead");
  if (head?.offsetWidth === 1) continue;  // for screen readers alone
  if (left < -1 || right > width + 1) cut.push([cell.parentNode.textContent, right]);
}
return cut;
"""


@needs_browser
@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_no_column_is_cut_at_any_width(width, scored, compared, unscored, tmp_path):
    folder, rows = unscored
    plain = write_unscored(folder, rows, {"Seed": "10"})
    for page in (scored, compared[3], plain):
        assert probed(page, CUT, tmp_path, width=width) == [], page.name


@needs_browser
def test_on_paper_headers_are_repeated(scored, tmp_path):
    pages = printed(scored, tmp_path)
    if pages is None:
        pytest.skip("no pdftotext on this machine")
    with_cases = [page for page in pages if page.count("a_rather_long_name_") > 3]
    assert len(with_cases) > 1 and len(pages) < 12
    assert all(re.search(r"Case .*Dice .*Uncertainty", page, re.DOTALL) for page in with_cases)
    assert sum(page.count("flag_") for page in pages) == 40, "all settings are on paper"
