"""HTML -> text with Markdown headings. Scripts, styles and hidden elements are left out."""

import re

from selectolax.lexbor import LexborHTMLParser, LexborNode

from retriever.clean import clean, clean_line
from retriever.item import Item

_SKIPPED = {
    "script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "canvas", "audio", "video",
    "select", "button", "nav", "dialog",
}  # fmt: skip
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "dd", "details", "div", "dl", "dt", "fieldset", "figcaption",
    "figure", "footer", "form", "header", "hr", "html", "main", "ol", "p", "pre", "section", "summary", "table", "ul",
}  # fmt: skip
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_LINES = {"li": "- ", "tr": ""}
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)


def read_html(text: str, raw: bytes) -> Item:
    """The title is `<title>`, else the first heading. Blocks are separated by a blank line, list items by a newline."""
    tree = LexborHTMLParser(text)
    title_node = tree.css_first("title")
    heading = tree.css_first("h1, h2, h3")
    title = clean_line(title_node.text() if title_node else "") or clean_line(heading.text() if heading else "")
    root = tree.body or tree.root
    body = _tidy("".join(_pieces(root))) if root else ""
    return Item(text=body, raw=raw, title=title or None)


def _pieces(root: LexborNode) -> list[str]:
    """Text pieces in document order. Walks with its own stack: hostile pages nest deeper than Python recurses."""
    pieces: list[str] = []
    preformatted = 0
    stack: list[tuple[LexborNode, bool]] = [(root, True)]
    while stack:
        node, entering = stack.pop()
        if node.is_text_node:
            content = clean(node.text_content or "")
            if not preformatted:
                content = re.sub(r"\s+", " ", content)
                at_line_start = not pieces or pieces[-1].endswith("\n")
                content = content.lstrip() if at_line_start else content
            if content:
                pieces.append(content)
            continue
        tag = node.tag or ""
        if not entering:
            preformatted -= tag == "pre"
            if after := _after(tag):
                pieces.append(after)
            continue
        if tag in _SKIPPED or not node.is_element_node or _hidden(node):
            continue
        if before := _before(tag):
            pieces.append(before)
        preformatted += tag == "pre"
        stack.append((node, False))
        children = []
        child = node.child
        while child is not None:
            children.append(child)
            child = child.next
        stack.extend((child, True) for child in reversed(children))
    return pieces


def _hidden(node: LexborNode) -> bool:
    attributes = node.attributes
    return "hidden" in attributes or bool(_HIDDEN_STYLE.search(attributes.get("style") or ""))


def _before(tag: str) -> str:
    if tag in _HEADINGS:
        return "\n\n" + _HEADINGS[tag]
    if tag in _LINES:
        return "\n" + _LINES[tag]
    return "\n\n" if tag in _BLOCKS else "\n" if tag == "br" else ""


def _after(tag: str) -> str:
    if tag in _HEADINGS or tag in _BLOCKS:
        return "\n\n"
    return " | " if tag in ("td", "th") else ""


def _tidy(text: str) -> str:
    """No trailing spaces or cell marks, no empty headings, at most one blank line in a row."""
    lines = (line.rstrip().removesuffix(" |").rstrip() for line in text.split("\n"))
    kept = (line for line in lines if not line or line.strip("#"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
