"""The report page: whole in one file, true to the record, and not to be talked into anything by a file's name."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from knife.report import report
from knife.settings import Settings, Wish
from knife.translation import translate

HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}[red]&lt;.nii'


class Page(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def images(self, alt: str) -> list[np.ndarray]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img" and attributes["alt"] == alt]
        data = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
        return [np.asarray(PIL.Image.open(io.BytesIO(one))) for one in data]


@pytest.fixture
def done(models, images, tmp_path):
    """Translate a slice whose file has a hostile name, and one with a wanted mask."""
    hostile = Path(shutil.copy(images / "slice.nii", tmp_path / HOSTILE))
    few = Settings(noise_level=10, steps=5)
    return translate(
        [hostile, images / "healthy.nii"], Wish("segment", str(images / "mask.nii")), models=models, settings=few
    )


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
            outlined = 0 if alt == "input" else 40  # the outline of the mask is drawn over the output
            for found, plane in zip(shown[4 * i : 4 * i + 4], wanted, strict=True):
                assert (found[..., 1] != plane).sum() <= outlined
    assert len(page.images("change")) == 2


def test_the_record_and_the_course_are_there(done):
    page = Page(report(done))
    for one in done:
        assert json.dumps(one.record, indent=1) in page.text
    assert page.text.count("what the guide saw, from noise level 10") == 2 * len(done[0].record["after"])
    assert done[0].record["synthetic"] in page.text
    assert "red: where it was asked for" in page.text


def test_colours_are_one_picture(models, images):
    few = Settings(noise_level=10, steps=5)
    page = Page(report(translate(images / "face.png", Wish("regress", "0.3"), models=models, settings=few)))
    (shown,) = page.images("input")
    assert np.array_equal(shown, np.asarray(PIL.Image.open(images / "face.png")))
