"""report.html: self-contained, small, with the values of the tables, working in a browser."""

import csv
import html
import json
import re

import numpy as np
import pytest
from browser import needs_browser, probed
from helpers import script, succeeded
from PIL import Image

from guided_diffusion.report import charts, report, thumbnails
from guided_diffusion.report.canvas import FUSED, image_panel, soft_png
from guided_diffusion.report.pictures import overlay
from guided_diffusion.report.report import choose_pictured, page, write_report
from guided_diffusion.report.thumbnails import SIDE, collect_layers, layers, outline
from guided_diffusion.scoring.evaluate import evaluate_all

NUMBERS = ("dice", "iou", "precision", "sensitivity", "hd95", "surface_dice", "uncertainty")


def disc(radius, size=48):
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    return (x**2 + y**2 <= radius**2).astype(np.float32)


def save(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(soft_png(mask)).save(path)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Twelve discs of growing error, one of them named to break a page, and an empty truth."""
    place = tmp_path_factory.mktemp("report")
    names = [f"{k:02d}" for k in range(10)] + ["x&lt;b&gt;'", "nothing"]
    for k, name in enumerate(names):
        truth = disc(12) * (name != "nothing")
        members = [disc(12 - k * 0.8), disc(12 - k * 0.7), disc(12)]
        for index, member in enumerate(members):
            save(place / f"pred/{name}_output{index}.png", member)
        fused = np.mean(members, axis=0)
        save(place / f"pred/{name}_output_ens.png", fused)
        save(place / f"gt/{name}.png", truth)
        if k % 2:
            picture = overlay(np.ones((3, 48, 48)) * 0.4, truth, fused, fused / 4, name=name)
            Image.fromarray(picture).save(place / f"pred/{name}_overlay.png")
    evaluation = evaluate_all(place / "pred", place / "gt")
    return evaluation, write_report(evaluation, {"Command": "python <x>", "Empty": ""})


def table(text):
    """The cells of the cases' table: by case, the full values."""
    found = {}
    for row in re.findall(r'<tr data-index="\d+".*?</tr>', text):
        cells = dict(re.findall(r'data-key="(\w+)" data-value="([^"]*)"', row))
        found[html.unescape(cells.pop("name"))] = cells
    return found


def test_values_are_those_of_scores_csv(scored):
    evaluation, path = scored
    with (evaluation.folder / "scores.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    cells = table(path.read_text("utf-8"))
    assert cells.keys() == rows.keys() and len(rows) == 12
    assert all(cells[name] == {key: rows[name][key] for key in NUMBERS} for name in rows)


def test_nothing_leaves_the_file(scored):
    text = scored[1].read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|\burl\(", re.sub(r'"data:[^"]*"', "", text))
    assert not re.search(r"<(link|iframe|script src|img)", text)
    linked = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', text)
    assert linked == ["scores.csv", "masks.csv", "components.csv"], "files beside the page"
    assert "default-src 'none'" in text
    assert "<!--{" not in text and ">x&lt;b" not in text and ">x&amp;lt;b" in text
    assert "python &lt;x&gt;" in text and "<dt>Empty" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert len(data["cases"]) == 12 and data["cases"][-1]["name"] == "x&lt;b&gt;'"
    beside = next(case["links"] for case in data["cases"] if case["name"] == "01")
    assert beside == {"overlay": "01_overlay.png", "soft mask": "01_output_ens.png"}
    assert [bool(case["views"][0]["image"]) for case in data["cases"][:4]] == [
        False,
        True,
        False,
        True,
    ]


def test_a_report_of_300_cases_is_small(scored):
    """Noise is what compresses worst: the layers of such a case, 300 times, and the page."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (256, 256, 3), np.uint8)
    wild = generator.random((256, 256)).astype(np.float32)
    most = sum(map(len, map(str, layers(noise, wild, wild[::-1], wild / 2))))
    assert 300 * most + scored[1].stat().st_size < 20e6  # of pure noise; photographs take a third
    smooth = np.asarray(Image.fromarray(noise[:12, :12]).resize((256, 256), Image.BICUBIC))
    usual = sum(map(len, map(str, layers(smooth, disc(80, 256), disc(85, 256), wild / 9))))
    assert 300 * usual + scored[1].stat().st_size < 10e6


def test_the_trust_in_probability_and_uncertainty(scored):
    evaluation, path = scored
    text = path.read_text("utf-8")
    rows = dict(re.findall(r'<tr><th scope="row">([^<]*)</th><td [^>]*>([^<]*)</td>', text))
    uncertainty, calibration = (evaluation.summary[key] for key in ("uncertainty", "calibration"))
    assert rows["Spread / skill, 1 is calibrated"] == f"{uncertainty['spread_skill']:.2f}"
    assert rows["Negative log-likelihood, nats"] == f"{calibration['nll']:.4f}"
    assert rows["Brier score"] == f"{calibration['brier']:.4f}"
    assert rows["Area under risk and coverage"] == f"{uncertainty['risk_coverage']['area']:.4f}"
    shares = {entry["dice"]: entry["share"] for entry in uncertainty["risk_coverage"]["hand_over"]}
    assert 0 < shares[0.8] < shares[0.95] < 1
    assert rows["To hand over for Dice 0.95"] == f"{100 * shares[0.95]:.0f} %"


def test_the_risk_coverage_curve_has_a_dot_for_each_dice_that_is_reached(scored):
    (drawn,) = re.findall(r"<svg[^>]*Risk-coverage curve.*?</svg>", scored[1].read_text("utf-8"))
    curve = scored[0].summary["uncertainty"]["risk_coverage"]
    reached = [entry for entry in curve["hand_over"] if entry["share"]]
    assert drawn.count("<circle") == len(reached) > 0
    assert drawn.count('class="curve one"') == 1 and drawn.count('class="curve quiet"') == 2
    number = drawn.split('class="curve one" points="')[1].split('"')[0].count(",")
    assert number == len(curve["curve"]["dice"]) == 12
    for entry in reached:
        assert f"{100 * entry['share']:.0f} % of the cases for {entry['dice']:g}" in drawn


def test_masks_read_by_scoring_are_not_read_again(scored, monkeypatch):
    folder = scored[0].folder
    evaluation = evaluate_all(folder, folder.parent / "gt", collect=collect_layers(folder))
    whole = page(evaluation, {})
    with monkeypatch.context() as patched:
        patched.setattr(report, "load_case", None)
        assert page(evaluation, {}, evaluation.collected) == whole

    monkeypatch.setattr(thumbnails, "MOST_PICTURES", 5)
    some = evaluate_all(folder, folder.parent / "gt", collect=collect_layers(folder)).collected
    assert list(some) == list(evaluation.collected)[:5]
    assert page(evaluation, {}, some) == whole, "the others are read again"


def test_the_choice_of_pictured_cases():
    assert choose_pictured([0.5] * 5) == [0, 1, 2, 3, 4]
    dice = [k / 1000 for k in range(1000)]
    some = choose_pictured(dice, 30)
    assert len(some) == 30
    assert some[:10] == list(range(10)) and some[-10:] == list(range(990, 1000))
    assert max(np.diff(some)) < 120
    assert 7 not in choose_pictured([None if k == 7 else k / 50 for k in range(50)], 6)
    assert choose_pictured([None, 0.5, None, 0.4], 3) == [0, 1, 3]


# ------------------------------------------------------------------------------------- its parts


def test_an_outline_by_hand():
    square = np.zeros((8, 8))
    square[2:6, 3:5] = 1
    numbers = np.array(re.findall(r"[\d.]+", outline(square)), dtype=float).reshape(-1, 2)
    assert numbers.min(axis=0) == pytest.approx([3, 2], abs=0.51)
    assert numbers.max(axis=0) == pytest.approx([5, 6], abs=0.51)
    assert outline(np.zeros((4, 4))) == ""
    whole = np.array(re.findall(r"[\d.]+", outline(np.ones((4, 4)), scale=10)), dtype=float)
    assert (whole.min(), whole.max()) == (pytest.approx(0, abs=5.1), pytest.approx(40, abs=5.1))
    ring = disc(20) - disc(8)
    assert outline(ring).count("M") == outline(ring).count("z") == 2


def test_layers_have_the_case_s_proportions():
    picture = np.full((30, 60, 3), 90, np.uint8)
    found = layers(picture, np.ones((60, 120)), np.zeros((60, 120)), np.zeros((60, 120)))
    assert (found.width, found.height) == (SIDE, SIDE // 2)
    assert found.image.startswith("data:image/jpeg;base64,") and found.truth
    assert (found.fused, found.uncertainty) == ("", "")
    assert layers(None, np.ones((4, 4)), np.ones((4, 4)), np.ones((4, 4)) / 2).image == ""


@pytest.mark.parametrize(("height", "width"), [(48, 48), (30, 60), (64, 20)])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_image_is_cut_out_of_an_overlay(height, width, labelled):
    image = np.zeros((3, height, width), np.float32)
    image[0] = np.linspace(0, 1, width)
    truth = np.ones((height, width)) if labelled else None
    drawn = overlay(image, truth, image[0], image[0] / 2, name="x")
    panel = image_panel(drawn, (height, width))
    assert max(panel.shape[:2]) == 320
    assert panel[160 * height // max(height, width), :, 0][[0, -1]] == pytest.approx(
        [0, 255], abs=3
    )
    assert not panel[..., 1:].any()
    assert image_panel(drawn[:60], (height, width)) is None


@pytest.mark.parametrize(("cleaned", "usual"), [(127 / 255, 0.1), (0.5, 0.9)])
def test_what_is_not_the_edge_of_a_mask_has_no_outline(cleaned, usual):
    """Removed components lie just below one half, filled holes at it, over their whole area."""

    def line(value):
        fused = disc(18) * 0.9 if usual == 0.9 else np.zeros((48, 48))
        fused[20:28, 20:28] = value
        drawn = overlay(np.full((3, 48, 48), 0.4), None, fused, fused * 0, name="x")
        return (np.abs(drawn.astype(int) - FUSED).max(axis=-1) < 30).sum()

    assert line(cleaned) == line(usual)


@pytest.mark.parametrize(
    ("most", "marks"),
    [(80, (0, 20, 40, 60, 80)), (0.35, (0, 0.1, 0.2, 0.3, 0.4)), (3, (0, 1, 2, 3)), (0, (0, 1))],
)
def test_round_marks(most, marks):
    assert charts.round_marks(most) == pytest.approx(marks)


def test_a_figure_by_hand():
    frame = charts.Plot("a <title>", charts.Axis("x"), charts.Axis("y", 0, 10, (0, 10)))
    left, base = frame.at((0, 0))
    right, top = frame.at((1, 10))
    assert frame.at((0.5, 5)) == pytest.approx(((left + right) / 2, (base + top) / 2), abs=0.1)
    drawn = charts.figure(frame, charts.bars(frame, [10, 0]), charts.curve(frame, [], "one"))
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"', drawn)]
    assert heights == pytest.approx([base - top, 0]) and "<title>a &lt;title&gt;" in drawn


# ------------------------------------------------------------------------------------- a browser

PROBE = """
  const seen = {}, find = what => document.querySelector(what);
  const rows = () => [...document.querySelectorAll("#list tbody tr")].filter(r => !r.hidden);
  const all = key => rows().map(r => r.querySelector(`[data-key="${key}"]`).dataset.value);
  const dice = () => all("dice");
  const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const type = (id, text) => {
    find("#" + id).value = text;
    find("#" + id).dispatchEvent(new Event("input", {bubbles: true}));
  };
  seen.sorted = dice();
  document.querySelector('#list thead [data-key="dice"] button').click();
  seen.reversed = dice();
  document.querySelector('#list thead [data-key="name"] button').click();
  seen.names = all("name");
  press("ArrowLeft"); press("ArrowLeft"); press("ArrowRight");
  seen.at = document.getElementById("place").textContent;
  seen.drawn = document.querySelector("#stage path.truth").getAttribute("d").length > 20;
  type("search", "01");
  seen.shown = [find("#name").textContent, find("#stage .photo").getAttribute("href").length > 400];
  seen.links = [...document.querySelectorAll("#links a")].map(link => link.getAttribute("href"));
  type("search", "");
  const hidden = () => getComputedStyle(document.querySelector("#stage path.truth")).display;
  seen.before = hidden(); press("t"); seen.after = hidden();
  document.querySelector('[data-layer="truth"]').click(); seen.again = hidden();
  type("opacity", "0.3");
  seen.opacity = getComputedStyle(document.querySelector("#stage path.truth")).opacity;
  type("low", "0.9"); seen.high = dice(); type("low", "");
  type("search", "noth"); seen.found = rows().length; type("search", "");
  seen.cards = document.querySelectorAll(".card").length;
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.requests = loaded.filter(name => !name.startsWith("data:"));
  return seen;
"""


@needs_browser
def test_sorting_toggling_and_filtering_in_a_browser(scored, tmp_path):
    evaluation, path = scored
    seen = probed(path, PROBE, tmp_path)
    dice = sorted(row.dice for row in evaluation.scores[""].rows)
    assert [float(value) for value in seen["sorted"]] == dice
    assert [float(value) for value in seen["reversed"]] == dice[::-1]
    names = sorted(row.name for row in evaluation.scores[""].rows if row.name[0].isdigit())
    assert [name for name in seen["names"] if name[0].isdigit()] == names
    assert seen["drawn"] and seen["shown"] == ["01", True]
    assert seen["links"] == ["01_overlay.png", "01_output_ens.png"]
    assert (seen["before"], seen["after"], seen["again"]) == ("inline", "none", "inline")
    assert seen["opacity"] == "0.3"
    assert [float(value) >= 0.9 for value in seen["high"]] == [True] * sum(d >= 0.9 for d in dice)
    assert (seen["found"], seen["cards"], seen["requests"]) == (1, 9, [])
    assert seen["at"] == "10 of 12"


# ------------------------------------------------------------------------------------ the script


def test_the_script_writes_a_report_unless_told_not_to(tmp_path):
    for k in range(3):
        save(tmp_path / f"pred/{k}_output_ens.png", disc(10 + k))
        save(tmp_path / f"gt/{k}.png", disc(12))
    command = ["--inp_pth", tmp_path / "pred", "--out_pth", tmp_path / "gt"]
    succeeded(script("segmentation_env", *command, "--report", False))
    assert not (tmp_path / "pred/report.html").exists()
    assert "report.html" in succeeded(script("segmentation_env", *command))
    text = (tmp_path / "pred/report.html").read_text("utf-8")
    assert "python scripts/segmentation_env.py --inp_pth" in text
    assert "<span>torch</span>" in text, "all settings are listed"


def test_classes_have_their_tables_and_a_choice(tmp_path):
    for k in range(3):
        for name, mask in (("1", disc(6)), ("2", disc(14 + k) - disc(6))):
            save(tmp_path / f"pred/{k}_output_ens_{name}.png", mask)
        labels = (disc(6) + 2 * (disc(15) - disc(6))).astype(np.uint8)
        (tmp_path / "gt").mkdir(exist_ok=True)
        Image.fromarray(labels).save(tmp_path / f"gt/{k}.png")
    evaluation = evaluate_all(tmp_path / "pred", tmp_path / "gt", mask_labels="1,2")
    text = page(evaluation, {})
    rows = re.findall(r'<tr data-index="\d+".*?</tr>', text)
    assert len(rows) == 6 and rows[1].count('data-key="class" data-value="2"') == 1
    assert "<option>1</option><option>2</option>" in text
    assert "Scores of 1, cases with a lesion" in text and "Dice of 2" in text
