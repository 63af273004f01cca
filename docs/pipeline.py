"""Draw docs/pipeline.svg, the study in one picture: `python docs/pipeline.py`."""

from pathlib import Path

PAGE = Path(__file__).with_suffix(".svg")
SIZE = (830, 370)  # pixels

ABOUT = (
    "Patients are dealt to a proxy set, clients and a test set. A frozen teacher labels the proxy images. "
    "A small U-Net learns from it and from the masks. Hospitals train this start in rounds, and a server "
    "averages their weights. The result is scored on the test patients."
)

#: The picture has a ground of its own, so that it can be read on a light and on a dark page.
STYLE = """
    .ground { fill: #ffffff } .frame { fill: #eef3fa; stroke: #9db4d3 }
    .box { fill: #ffffff; stroke: #3b5b8c; stroke-width: 1.5 }
    .title { fill: #16222f; font-size: 16px; font-weight: 600 } .text { fill: #33475c; font-size: 14px }
    .way { fill: none; stroke: #3b5b8c; stroke-width: 1.8; marker-end: url(#tip) } .tip { fill: #3b5b8c }
    @media (prefers-color-scheme: dark) {
      .ground { fill: #0f1620 } .frame { fill: #182331; stroke: #46607f }
      .box { fill: #0f1620; stroke: #8fb2e3 } .title { fill: #eef3f9 } .text { fill: #c3cfdc }
      .way { stroke: #8fb2e3 } .tip { fill: #8fb2e3 }
    }
"""

#: x, y, width and height in pixels, title, and lines of text below it; a frame's title stands at its top.
FRAMES = (((10, 10, 190, 350), "01 Data"), ((290, 148, 530, 98), "04 Federate, in rounds"))
BOXES = (
    ((25, 44, 160, 76), "proxy set", "for the start"),
    ((25, 156, 160, 84), "clients", "each keeps", "its images"),
    ((25, 274, 160, 72), "test set", "for scores alone"),
    ((290, 44, 200, 76), "02 Teacher", "large and frozen,", "prompted with boxes"),
    ((600, 44, 220, 76), "03 Distill", "a small U-Net: random,", "pretraining or fm"),
    ((305, 178, 200, 58), "hospitals train", "Eq. 2"),
    ((605, 178, 200, 58), "server averages", "Eq. 3"),
    ((600, 274, 220, 72), "05 Analysis", "Dice, intervals, verdicts"),
)
#: An SVG path, and where its words stand.
WAYS = (
    ("M185 66 H286", "images", (238, 58)),
    ("M490 66 H596", "logits", (545, 58)),
    ("M185 108 H240 V132 H560 V104 H596", "masks", (545, 97)),
    ("M185 207 H301", "images", (245, 199)),
    ("M710 120 V144", "weights", (745, 138)),
    ("M505 196 H601", "weights", (555, 188)),
    ("M605 220 H509", "weights", (555, 235)),
    ("M710 246 V270", "weights", (745, 264)),
    ("M185 310 H596", "images and masks", (390, 302)),
)


def _text(kind: str, x: float, y: float, words: str) -> str:
    return f'  <text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'


def _rectangle(kind: str, x: int, y: int, width: int, height: int) -> str:
    return f'  <rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'


def picture() -> str:
    """Return the SVG."""
    lines = [_rectangle("ground", 0, 0, *SIZE)]
    for (x, y, width, height), title in FRAMES:
        lines += [_rectangle("frame", x, y, width, height), _text("title", x + width / 2, y + 21, title)]
    for (x, y, width, height), title, *words in BOXES:
        top = y + height / 2 - 9 * len(words) + 5
        lines += [_rectangle("box", x, y, width, height), _text("title", x + width / 2, top, title)]
        lines += [_text("text", x + width / 2, top + 19 * row, part) for row, part in enumerate(words, 1)]
    for path, words, place in WAYS:
        lines += [f'  <path class="way" d="{path}"/>', _text("text", *place, words)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE[0]} {SIZE[1]}" role="img" '
        f'aria-labelledby="title about" font-family="system-ui, sans-serif" text-anchor="middle">\n'
        f'  <title id="title">The study in one picture</title>\n  <desc id="about">{ABOUT}</desc>\n'
        f"  <style>{STYLE}  </style>\n"
        '  <defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="tip" d="M0 0 L10 5 L0 10 z"/></marker></defs>\n'
    )
    return head + "\n".join(lines) + "\n</svg>\n"


if __name__ == "__main__":
    PAGE.write_text(picture(), encoding="utf-8")
