"""The report page: whole in one file, true to the record, and not to be talked into anything by a file's name."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from knife import panel
from knife.report import CYAN, DASHES, MEANT, course, report, wanted_numbers
from knife.settings import Settings, Wish
from knife.translation import translate

HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}[red]&lt;.nii'
NAMES = ['"><img src=x onerror=alert(1)>.png', "[/red]", "</script><script>document.title='owned'</script>"]
FEW = Settings(noise_level=10, steps=5)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page(HTMLParser):
    """Collects tags with their attributes, and the text; rows of tables as lists of their cells."""

    def __init__(self, page: bytes | str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text, self.in_cell = "", False
        self.feed(page if isinstance(page, str) else page.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data.strip()

    def row(self, first: str) -> list[str]:
        """Return the one row that begins with a text."""
        (found,) = (row for row in self.rows if row and row[0] == first)
        return found

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """Return the attributes of all tags of a kind that have certain values."""
        return [a for name, a in self.tags if name == tag and wanted.items() <= a.items()]

    def images(self, alt: str) -> list[np.ndarray]:
        sources = [attributes["src"] for attributes in self.all("img", alt=alt)]
        data = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
        return [np.asarray(PIL.Image.open(io.BytesIO(one))) for one in data]


@pytest.fixture(scope="module")
def done(models, images, tmp_path_factory):
    """Translate a slice whose file has a hostile name, and one with a wanted mask."""
    hostile = Path(shutil.copy(images / "slice.nii", tmp_path_factory.mktemp("names") / HOSTILE))
    wish = Wish("segment", str(images / "mask.nii"))
    return translate([hostile, images / "healthy.nii"], wish, models=models, settings=FEW)


@pytest.fixture(scope="module")
def several(models, images):
    """Translate a slice by two tasks, within a region, with a tolerance that one cannot miss and one cannot reach."""
    (one,) = translate(
        images / "slice.nii",
        Wish("segment", str(images / "mask.nii")),
        Wish("regress", "by:+50%"),
        models=models,
        region="ellipse:16,16,9,6",
        settings=Settings(noise_level=10, steps=5, tolerance=1e-6),
    )
    return one


def test_names_are_shown_and_never_obeyed(done):
    page = Page(report(done))
    assert HOSTILE in page.text
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "49" not in re.findall(r"h2>([^<]*)<", report(done).decode())[0]


def test_the_page_asks_nothing_of_the_network(done):
    page = Page(report(done))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "form")
        assert all(str(attributes.get(name, "data:")).startswith("data:") for name in ("src", "href"))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "http://" not in report(done).decode()
    assert "https://" not in report(done).decode()


def test_images_are_those_of_the_translation(done):
    page = Page(report(done))
    for alt, which in (("input", "source"), ("output", "result")):
        shown = page.images(alt)
        assert len(shown) == 2 * 4
        for i, one in enumerate(done):
            wanted = getattr(one, which).normalised(None, (0, 1)).mul(255).round().byte().numpy()
            for found, plane in zip(shown[4 * i : 4 * i + 4], wanted, strict=True):
                grey = (found == found[..., :1]).all(2)
                assert 0 < (~grey).sum() <= 40  # the outline of the mask
                assert np.array_equal(found[..., 0][grey], plane[grey])


def test_the_map_has_its_scale_and_the_outlines_of_mask_and_region(several):
    page = Page(report([several]))
    (found,), (scale,) = page.images("change"), page.images("scale")
    assert (scale == panel.heat(torch.linspace(0, 1, 256)[None], 1)).all()
    before, after = (image.normalised(None, (0, 1)) for image in (several.source, several.result))
    change = (after - before).abs().sum(0)
    assert f"{float(change.max()):.2g}" in page.text
    cyan = torch.from_numpy((found == CYAN).all(2))
    assert cyan.any()
    assert not (cyan & ~several.wanted).any()
    dashes = torch.from_numpy((found == DASHES[1]).all(2))
    assert dashes.any()
    assert not (dashes & ~(several.region[0] > 0)).any()
    rest = ~several.wanted & (several.region[0] == 0)
    assert (found[rest] == panel.heat(change, float(change.max()))[rest]).all()
    assert "region that may change" in page.text
    assert "region that may change" not in Page(report([replace(several, region=None)])).text


def test_the_record_and_the_course_are_there(done):
    page = Page(report(done))
    for one in done:
        assert json.dumps(one.record, indent=1) in page.text
    assert len(page.all("path", **{"class": "course"})) == 2 * len(done[0].record["after"])
    assert done[0].record["synthetic"] in page.text
    assert not page.all("line", **{"class": "wanted"})  # a mask is no number


def test_a_course_leads_from_the_highest_level_to_the_image_past_what_was_wanted():
    drawn = course("value", [(100, 0.0), (25, 1.0), (0, 0.5)], 0.5, 2.0)
    places = [tuple(map(float, place.split())) for place in drawn["path"][1:].split(" L")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert (x0, x2) == (48, 248)
    assert x1 - x0 == pytest.approx(0.75 * (x2 - x0), abs=0.1)
    assert y1 - y2 == pytest.approx(0.5 * (y1 - y0), abs=0.1)
    assert drawn["wanted"] - y0 == pytest.approx(2 * (y1 - y0), abs=0.2)
    assert drawn["end"] == (x2, y2)
    assert all(22 <= y <= 140 for y in (y0, y1, y2, drawn["wanted"]))


def test_a_course_without_change_is_drawn():
    drawn = course("dice", [(10, 0.0), (0, 0.0)], 0.0, None)
    assert drawn["wanted"] is None
    assert drawn["path"] == "M48.0 81.0 L248.0 81.0"


def test_several_tasks_are_told_apart(several):
    page, record = Page(report([several])), several.record
    before, after = (record[when]["regress value"] for when in ("before", "after"))
    wanted = 1.5 * before
    regress, segment = page.row("regress"), page.row("segment")
    assert regress[1] == f"by:+50% = {wanted:.6g}"
    assert regress[2] == f"value {before:.4g} → {after:.4g}"
    assert regress[3] == f"not reached: {record['error']['regress']:.3g} off, 1e-06 allowed"
    assert record["error"]["regress"] == pytest.approx(abs(after - wanted), rel=1e-3)
    assert segment[1] == "mask.nii"
    assert f"dice {record['before']['segment dice']:.4g} → {record['after']['segment dice']:.4g}" in segment[2]
    assert regress[4] == segment[4] == "no judge"
    assert wanted_numbers(record) == {"regress value": pytest.approx(wanted, rel=1e-5)}
    assert len(page.all("line", **{"class": "wanted"})) == 1


def test_attempts_others_and_what_stayed_are_tables(several):
    page, record = Page(report([several])), several.record
    assert page.row("strength")[:3] == ["strength", "regress, off by", "segment, off by"]
    assert len(record["attempts"]) > 1
    for tried in record["attempts"]:
        row = page.row(f"{tried['strength']:g}")
        assert row[1:3] == [f"{tried['error'][task]:.3g}" for task in ("regress", "segment")]
        assert row[3] == ("used" if tried["strength"] == record["strength"] else "")
    for name, value in record["others"]["after"].items():
        assert page.row(name) == [name, f"{record['others']['before'][name]:.4g}", f"{value:.4g}"]
    for name, value in record["preservation"].items():
        assert page.row(MEANT[name])[1] == (f"{value:.4f}" if "ssim" in name else f"{value:.2%}")


def test_a_target_that_was_reached_is_said_to_be_and_the_judge_has_its_say(done):
    record = {
        **done[0].record,
        "error": {"segment": 0.012},
        "tolerance": {"segment": 0.05},
        "reached": True,
        "judge": {"before": {"dice": 0.0}, "after": {"dice": 0.75}, "error": {"segment": 0.25}},
    }
    page = Page(report([replace(done[0], record=record), done[1]]))
    rows = [row for row in page.rows if row[0] == "segment" and len(row) == 5]
    assert rows[0][3:] == ["reached: 0.012 off, 0.05 allowed", "dice 0 → 0.750.25 off"]
    assert rows[1][4] == "no judge"
    assert rows[1][3] == f"{done[1].record['error']['segment']:.3g} off"  # nobody knows what is near enough
    missed = replace(done[1], record={**record, "reached": False})
    assert "1 of 2 images reached their targets." in Page(report([replace(done[0], record=record), missed])).text


def test_settings_and_models_are_told(several):
    page, record = Page(report([several])), several.record
    assert page.row("noise level")[1] == "10"
    assert page.row("control")[1] == "yes"
    assert page.row("precision")[1] == record["settings"]["precision"] != "auto"
    assert page.row("region")[1] == "ellipse:16,16,9,6"
    roles = [row[0] for row in page.rows if row[-1] in {model["sha256"][:16] for model in record["models"]}]
    assert roles == ["walks", "guides", "guides"]


def test_colours_are_one_picture_and_more_has_no_line(models, images):
    page = Page(report(translate(images / "face.png", Wish("regress", "+"), models=models, settings=FEW)))
    (shown,) = page.images("input")
    assert np.array_equal(shown, np.asarray(PIL.Image.open(images / "face.png")))
    assert not page.all("line", **{"class": "wanted"})
    assert page.row("regress")[3].endswith(" off")


def seen_by_a_browser(page: Path, profile: Path) -> str:
    """Return the document that headless Chromium makes of a page, its script run; skip without a browser."""
    named = [os.environ.get("KNIFE_CHROMIUM", ""), *BROWSERS]
    browser = next((found for name in named if name and (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on PATH, and no KNIFE_CHROMIUM")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    run = subprocess.run(
        [browser, *options, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "HOME": str(profile)},
    )
    return run.stdout


def test_a_browser_runs_the_page_and_obeys_no_name(done, tmp_path):
    records = [{**done[0].record, "input": [name], "wanted": {"segment": name}} for name in NAMES]
    file = tmp_path / f"{NAMES[0]}.html"
    file.write_bytes(report([replace(done[0], record=record) for record in records]))
    shown = seen_by_a_browser(file, tmp_path / "profile")
    page = Page(shown)
    pairs, sliders = page.all("div", **{"class": "pair"}), page.all("input", type="range")
    assert len(pairs) == len(sliders) == 3 * 4
    assert all(str(pair["style"]).replace(" ", "") == "--cut:50%;" for pair in pairs)  # set by the script alone
    assert len(page.all("script")) == 1
    assert not page.all("img", src="x")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<title>knife: segment mask.nii</title>" in shown
    for name in NAMES:
        assert name in page.text
