"""Pieces to play with: a picture that follows its controls, and stands still where nobody can move them.

A notebook that is run by papermill, nbval or nbconvert keeps the still picture alone: no widget is made, and
none is missing later. In JupyterLab the widgets come after the picture and take its place.
"""

import asyncio
import base64
import html
import io
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from fmfl.errors import UserError

if TYPE_CHECKING:  # imported where a front end shows them: it takes a fifth of a second
    import ipywidgets

#: Dots an inch, as Jupyter draws figures inline.
DPI = 100

#: Look of the live pieces. The first rule hides the still picture that stands just before one; a browser
#: without `:has` shows both. Handles of sliders show where the keyboard is.
STYLE = """
.jp-OutputArea-child:has(+ .jp-OutputArea-child .fmfl-live) { display: none; }
.fmfl-live { align-items: flex-start; }
.fmfl-live .noUi-handle:focus-visible { outline: 3px solid #0072B2; outline-offset: 2px; }
.fmfl-stage { position: relative; overflow: visible; width: max-content; max-width: 100%; background: white; }
.fmfl-stage .widget-html, .fmfl-stage .widget-html-content { height: auto; margin: 0; line-height: 0; }
.fmfl-stage img { max-width: 100%; height: auto; margin: 0; }
.fmfl-stage .fmfl-pad, .fmfl-pad .widget-html-content { position: absolute; inset: 0; width: auto; }
.fmfl-pad .fmfl-area { position: absolute; cursor: crosshair; touch-action: none; }
.fmfl-gesture { display: none; }
"""

#: Names for software that reads aloud, which ipywidgets does not give: of each slider's handles, by its
#: label, and of the words, which are read when they change.
NAMES = """const box = this.closest('.fmfl-live');
const name = () => {
  for (const handle of box.querySelectorAll('.noUi-handle:not([aria-label])')) {
    const slider = handle.closest('.widget-slider');
    const several = slider.querySelectorAll('.noUi-handle').length > 1;
    const which = several ? [', from', ', to'][handle.dataset.handle] : '';
    handle.setAttribute('aria-label', slider.querySelector('.widget-label').textContent + which);
  }
  for (const words of box.querySelectorAll('.fmfl-words:not([role])')) words.setAttribute('role', 'status');
};
new MutationObserver(name).observe(box, {childList: true, subtree: true});
name();"""

#: Area over a picture that tells where a pointer was pressed and where it is now, as shares of the area's
#: width and height, through a hidden text field. The first number, a time, tells one gesture from the next.
PAD = """<div class="fmfl-area" style="left:{left:.3%};top:{top:.3%};width:{width:.3%};height:{height:.3%}"
onpointerdown="this.setPointerCapture(event.pointerId); this.gesture = Date.now();
  const r = this.getBoundingClientRect();
  this.from = [(event.clientX - r.left) / r.width, (event.clientY - r.top) / r.height];
  event.preventDefault()"
onpointermove="if (!this.hasPointerCapture(event.pointerId)) return;
  const r = this.getBoundingClientRect();
  const to = [(event.clientX - r.left) / r.width, (event.clientY - r.top) / r.height];
  const field = this.closest('.fmfl-stage').querySelector('.fmfl-gesture input');
  field.value = [this.gesture, ...this.from, ...to].join();
  field.dispatchEvent(new Event('input', {{bubbles: true}}))"></div>"""


@dataclass(frozen=True)
class Slider:
    """A number that a person sets; whole where its step is."""

    label: str
    value: float
    low: float
    high: float
    step: float = 1

    def widget(self) -> "ipywidgets.Widget":
        """Return the slider."""
        import ipywidgets

        kind = ipywidgets.IntSlider if isinstance(self.step, int) else ipywidgets.FloatSlider
        return kind(self.value, min=self.low, max=self.high, step=self.step, **_labelled(self.label))


@dataclass(frozen=True)
class Range:
    """Two numbers that a person sets, the first not above the second."""

    label: str
    value: tuple[float, float]
    low: float
    high: float
    step: float = 1.0

    def widget(self) -> "ipywidgets.Widget":
        """Return the slider with two handles."""
        import ipywidgets

        limits = {"min": self.low, "max": self.high, "step": self.step}
        return ipywidgets.FloatRangeSlider(
            value=self.value, **limits, readout_format=".0f", **_labelled(self.label)
        )


@dataclass(frozen=True)
class Choice:
    """One of several things by name: {name: value}."""

    label: str
    value: object
    options: Mapping[str, object]

    def widget(self) -> "ipywidgets.Widget":
        """Return the list to choose from."""
        import ipywidgets

        return ipywidgets.Dropdown(
            options=list(self.options.items()), value=self.value, **_labelled(self.label)
        )


@dataclass(frozen=True)
class Steps:
    """A whole number from 0 that is stepped, run and paused."""

    label: str
    high: int
    value: int = 0
    seconds: float = 0.3

    def widget(self) -> "ipywidgets.Widget":
        """Return the slider; `around` gives it its buttons."""
        return Slider(self.label, self.value, 0, self.high).widget()

    def around(self, slider: "ipywidgets.Widget") -> "ipywidgets.Widget":
        """Return the slider with a button for one step, and one that runs and pauses.

        The kernel counts, not the browser: a step that takes its time is over before the next one begins.
        """
        import ipywidgets

        step = ipywidgets.Button(description="Step", tooltip=f"{self.label}: one more")
        run = ipywidgets.ToggleButton(description="Run", tooltip=f"{self.label}: one after another")

        def switch(change: Mapping[str, Any]) -> None:
            run.description = "Pause" if run.value else "Run"
            if run.value and all(task.done() for task in running):
                running.append(asyncio.get_running_loop().create_task(go_on()))

        async def go_on() -> None:
            while run.value and slider.value < self.high:
                slider.value += 1
                await asyncio.sleep(self.seconds)  # here the kernel hears of a pause
            run.value = False

        running: list[asyncio.Task] = []  # a task that nobody holds may be lost
        step.on_click(lambda _: setattr(slider, "value", slider.value + 1))  # the slider ends at its last
        run.observe(switch, "value")
        return ipywidgets.VBox([ipywidgets.HBox([step, run]), slider])


def _labelled(label: str) -> dict[str, Any]:
    """Return the label and the widths that all controls share."""
    return {"description": label, "style": {"description_width": "12em"}, "layout": {"width": "34em"}}


class Answer(NamedTuple):
    """A drawn picture, the words that tell the same, and the first axes' place as shares of the picture."""

    png: bytes
    words: str
    area: dict[str, float]


#: Draws a figure for the controls' values, and tells in words what it shows.
Draw = Callable[..., tuple[Figure, str]]
#: New values of the controls from those at a gesture's begin, and its two points as shares of the axes.
Drag = Callable[[dict[str, Any], tuple[float, float], tuple[float, float]], dict[str, Any]]


class Piece:
    """A picture and the controls that it follows.

    As the last line of a cell it shows itself: the still picture and, where a person's front end has asked,
    the live one in its place. Printed, it is the picture in words.
    """

    def __init__(self, draw: Draw, controls: Mapping[str, Any], *, drag: Drag | None = None) -> None:
        self.draw, self.controls, self.drag = draw, dict(controls), drag

    def answer(self, values: Mapping[str, Any]) -> Answer:
        """Draw the picture for the controls' values; without one where they are refused, which is told."""
        try:
            figure, words = self.draw(**values)
        except UserError as error:
            return Answer(b"", str(error), {})
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        place = figure.axes[0].get_position()
        plt.close(figure)  # else Jupyter shows it once more
        area = {"left": place.x0, "top": 1 - place.y1, "width": place.width, "height": place.height}
        return Answer(png.getvalue(), words, {side: float(share) for side, share in area.items()})

    @cached_property
    def still(self) -> Answer:
        """The picture as the controls begin."""
        return self.answer({name: control.value for name, control in self.controls.items()})

    def widget(self) -> "ipywidgets.Widget":
        """Return the live piece, for any front end that shows widgets."""
        return Live(self).box

    def __repr__(self) -> str:
        return self.still.words

    def _ipython_display_(self) -> None:
        from IPython.display import display

        picture = {"image/png": self.still.png} if self.still.png else {}
        display({"text/plain": self.still.words} | picture, raw=True)
        if front_end():
            display(self.widget())


def front_end() -> bool:
    """Tell if a person's front end asked for this cell: JupyterLab and its like name it, programs do not."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    return bool(kernel and (kernel.get_parent() or {}).get("metadata", {}).get("cellId"))


def _image(answer: Answer) -> str:
    """Return a picture as HTML: ipywidgets' own has no text for those who do not see it."""
    width, height = struct.unpack(">II", answer.png[16:24])  # where PNG has them
    content = base64.b64encode(answer.png).decode()
    size = f'width="{width}" height="{height}"'
    return f'<img {size} alt="{html.escape(answer.words)}" src="data:image/png;base64,{content}">'


class Live:
    """The widgets of a piece, tied together.

    Attributes:
        piece: what they show.
        controls: the widgets by the controls' names.
        picture, words: what follows them.
        box: all of it.
    """

    def __init__(self, piece: Piece) -> None:
        import ipywidgets

        self.piece, self.area, self.held, self.gesture = piece, {}, False, ("", {})
        self.controls = {name: control.widget() for name, control in piece.controls.items()}
        self.picture, self.words = ipywidgets.HTML(), ipywidgets.HTML()
        self.words.add_class("fmfl-words")
        self.stage = ipywidgets.Box([self.picture])
        self.stage.add_class("fmfl-stage")
        for control in self.controls.values():
            control.observe(self.follow, "value")
        self.follow()
        if piece.drag:
            self.stage.children = [self.picture, *self.pad()]
        shown = [
            control.around(self.controls[name]) if isinstance(control, Steps) else self.controls[name]
            for name, control in piece.controls.items()
        ]
        style = ipywidgets.HTML(f'<style onload="{html.escape(NAMES)}">{STYLE}</style>')
        self.box = ipywidgets.VBox([style, *shown, self.stage, self.words])
        self.box.add_class("fmfl-live")

    def pad(self) -> list["ipywidgets.Widget"]:
        """Return the area that takes a pointer's gestures, and the field that carries them here."""
        import ipywidgets

        pad, field = ipywidgets.HTML(PAD.format(**self.area)), ipywidgets.Text()
        pad.add_class("fmfl-pad")
        field.add_class("fmfl-gesture")
        field.observe(self.dragged, "value")
        return [pad, field]

    @property
    def values(self) -> dict[str, Any]:
        """The controls' values."""
        return {name: control.value for name, control in self.controls.items()}

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Set several controls, and draw once."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        self.follow()

    def follow(self, change: object = None) -> None:
        """Draw what the controls say; an answer without a picture leaves the last one.

        A mistake in the code is told, too: a front end would hide it in its log.
        """
        if self.held:
            return
        try:
            answer = self.piece.answer(self.values)
        except Exception as error:
            self.words.value = html.escape(f"{type(error).__name__}: {error}")
            raise
        if answer.png:
            self.picture.value, self.area = _image(answer), answer.area
        self.words.value = html.escape(answer.words)

    def dragged(self, change: Mapping[str, Any]) -> None:
        """Move the controls as a pointer's gesture says."""
        number, *points = change["new"].split(",")
        if number != self.gesture[0]:
            self.gesture = (number, self.values)
        x0, y0, x1, y1 = (min(1.0, max(0.0, float(point))) for point in points)
        with self.holding():
            for name, value in self.piece.drag(self.gesture[1], (x0, y0), (x1, y1)).items():
                self.controls[name].value = value
