"""The HTML page of a report: valid, whole in itself, and readable by anybody."""

from __future__ import annotations

import re

import pytest
from helpers_html import Page, contrast
from PIL import Image

from unclip.evaluation.page import DARK, LIGHT
from unclip.evaluation.report import Cell, Figure, Report, Section

RED = Image.new("RGB", (64, 64), "red")


def made() -> Report:
    settings = {"steps": list(range(60)), "markup": "<b>&</b>"}
    report = Report("A < B & “C”", {"model": "tiny", "made with": {"torch": "2.9", "n": None}, "settings": settings})
    report.figures = [Figure("fid", "FID", 12.345, "lower", 0.5, 3.0, "a note <with> marks"), Figure("x", "X", 1.0)]
    report.sections = [
        Section("Curves", "Words & more.", picture=("curves", Image.new("RGB", (1200, 300))), alt="Two plots: a; b"),
        Section("Table", "", (["", "1 %", "a & b"], [["row <1>", 0.5, "x"], ["row 2", 2, ""]])),
        Section("Table", "The same title again.", (["name", ""], [["one", "its note"]])),
        Section("Samples", "", None, ("samples", RED), [Cell([RED, RED], "pizza <3", ["real picture", "sample"])] * 2),
        Section("Sheet", picture=("sheet", RED)),
        Section("Bare cells", cells=[Cell([RED])]),
    ]
    return report


def test_the_page_is_valid_and_whole() -> None:
    text = made().html()
    page = Page(text)
    assert page.wrong == []
    assert (page.language, page.metas["color-scheme"]) == ("en", "light dark")
    assert "<script" not in text and "http" not in text and "url(" not in text and " src=\"data:image/png" in text
    for shown in ("A < B & “C”", "a note <with> marks", "row <1>", "pizza <3", "12.35 ± 0.5"):
        assert shown in page.text, shown
    assert [one["alt"] for one in page.images] == [
        "Two plots: a; b", *["real picture: pizza <3", "sample: pizza <3"] * 2, "Sheet", "picture 1",
    ]  # fmt: skip
    assert page.ids == ["part-figures", "part-curves", "part-table", "part-table-2", "part-samples", "part-sheet",
                        "part-bare-cells"]  # fmt: skip
    assert "torch 2.9, n null" in page.text
    assert "<details>" in text and '"markup": "<b>&</b>"' in page.text  # long settings, folded away


@pytest.mark.parametrize("broken", ["<p>", "</p>", "<tr>", '<img src="x">', "<h4>x</h4>", '<p id="part-curves"></p>'])
def test_the_reader_sees_what_is_wrong(broken: str) -> None:
    assert Page(made().html().replace("</main>", f"{broken}</main>")).wrong


def test_text_stands_out_in_both_schemes() -> None:
    for scheme in (LIGHT, DARK):
        for text in ("text", "quiet"):
            for ground in ("ground", "raised"):
                assert contrast(scheme[text], scheme[ground]) >= 7, (text, ground)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = re.search(r"<style>(.*)</style>", made().html(), re.S)
    assert style is not None and style[1].count("{") == style[1].count("}") and "%" + "%" not in style[1]


def test_an_empty_report_is_a_page_too() -> None:
    assert Page(Report("Nothing", {}).html()).wrong == []
