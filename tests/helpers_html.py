"""Strict reading of an HTML page: what a browser would quietly mend, or a screen reader not tell, is found wrong."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "input", "link", "source", "wbr", "col"}
# What the content model of HTML's standard allows inside these, of what our pages use.
CHILDREN = {
    "html": {"head", "body"}, "head": {"meta", "title", "style"}, "ul": {"li"}, "dl": {"dt", "dd"},
    "table": {"thead", "tbody"}, "thead": {"tr"}, "tbody": {"tr"}, "tr": {"th", "td"},
}  # fmt: skip
IN_PHRASING = {"p", "h1", "h2", "dt", "figcaption", "summary"}  # which hold no block
PHRASING = {"a", "span", "em", "strong", "code", "img"}


class Page(HTMLParser):
    """Collects what is wrong, in words."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []
        self.images: list[dict[str, str | None]] = []
        self.language: str | None = None
        self.text = ""
        self.metas: dict[str, str | None] = {}
        self.doctype = ""
        self.feed(text)
        self.close()
        if self.open:
            self.wrong.append(f"left open: {self.open}")
        if len(set(self.ids)) != len(self.ids):
            self.wrong.append("an id is given twice")
        self.wrong += [f"a link to {one}, which is not there" for one in self.links if one not in self.ids]
        if self.headings[:1] != [1] or self.headings.count(1) != 1:
            self.wrong.append("expected one h1, first of all headings")
        steps = zip(self.headings, self.headings[1:], strict=False)
        self.wrong += [f"h{a} is followed by h{b}" for a, b in steps if b > a + 1]
        if not self.language or self.doctype.lower() != "doctype html" or "viewport" not in self.metas:
            self.wrong.append("lang, doctype or viewport is missing")

    def handle_decl(self, decl: str) -> None:
        self.doctype = decl

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        parent = self.open[-1] if self.open else ""
        if parent in CHILDREN and tag not in CHILDREN[parent]:
            self.wrong.append(f"{tag} in {parent}")
        if any(one in IN_PHRASING for one in self.open) and tag not in PHRASING:
            self.wrong.append(f"{tag} within {self.open}")
        if len(given) != len(attributes):
            self.wrong.append(f"an attribute of {tag} is given twice")
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self.links += [value[1:] for value in [given.get("href") or ""] if value.startswith("#")]
        self.links += (given.get("aria-labelledby") or "").split()
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        if tag == "html":
            self.language = given.get("lang")
        if tag == "meta":
            self.metas[str(given.get("name", "charset"))] = given.get("content", given.get("charset"))
        if tag == "img":
            self.images.append(given)
            if not given.get("alt") or not given.get("width") or not given.get("height"):
                self.wrong.append("an image without words or size")
        if tag == "th" and not given.get("scope"):
            self.wrong.append("a th without scope")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing that is open")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


def contrast(first: str, second: str) -> float:
    """Of two colours #rrggbb, from 1 to 21 (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
