"""What an explorer is: controls, a pure computation of their values, and a figure of what it found.

A new explorer is a subclass that passes its controls on and defines `compute`, `figure` and `describe`; the rest is
shared. What a callback raises is shown nowhere by JupyterLab, so it is caught here and shown in the status line, while
the last good figure stays.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import ipywidgets as W
from matplotlib.figure import Figure

from smi.plotting.pictures import Picture


class Explorer:
    """Base of every explorer.

    Tab moves between the controls, arrow keys change one, Enter presses the button.

    Args:
        controls: Widgets by name, whose values are handed to `compute` under these names; sliders, for choices too:
            JupyterLab takes the arrow keys from dropdowns and radio buttons and moves to another cell.
        button: What a button says, where `compute` takes more than about 0.3 s; the figure then waits for it. Without
            one it follows the controls.

    Attributes:
        widget: What a notebook shows, for putting it into a layout of one's own.
    """

    def __init__(self, controls: Mapping[str, W.Widget], *, button: str = "") -> None:
        self.controls = dict(controls)
        for control in self.controls.values():
            control.continuous_update = False  # one computation a move, not one a pixel
            control.style.description_width = "11em"
            control.layout.width = "38em"
        self.button = W.Button(description=button, layout=W.Layout(width="auto")) if button else None
        self.picture: Picture | None = None
        self._numbers: dict[str, Any] = {}
        self._view, self._status = W.HTML(), W.HTML()
        pressed = [] if self.button is None else [self.button]
        self.widget = W.VBox([*self.controls.values(), *pressed, self._status, self._view])
        self._draw(self.values)
        for control in self.controls.values():
            control.observe(self._on_change if self.button is None else self._on_wait, names="value")
        if self.button is not None:
            self.button.on_click(self._on_change)

    def compute(self, *args: Any, **values: Any) -> Any:
        """What there is to show, from the controls' values alone: the same values give the same result."""
        raise NotImplementedError

    def figure(self, result: Any) -> Figure:
        """The figure of a result, made without pyplot."""
        raise NotImplementedError

    def describe(self, result: Any) -> tuple[str, str, dict[str, Any]]:
        """Alternative text (the same on every machine), caption (the readout), and the numbers of `state`."""
        raise NotImplementedError

    @property
    def values(self) -> dict[str, Any]:
        """The controls' values."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def state(self) -> dict[str, Any]:
        """The controls' values and the numbers shown, floats rounded to three digits."""
        return {name: _rounded(value) for name, value in (self.values | self._numbers).items()}

    @property
    def status(self) -> str:
        """What the status line says, as HTML; empty where all is well."""
        return self._status.value

    @property
    def readout(self) -> str:
        """What is shown below the controls, as HTML: the figure and its caption."""
        return self._view.value

    def _on_wait(self, change: object) -> None:
        self._status.value = "<p>The figure below is of other settings. Press the button.</p>"

    def _on_change(self, change: object) -> None:
        try:
            self._draw(self.values)
        except Exception as error:  # whatever it is, the reader must see it and be able to go on
            why = f"<b>Not updated:</b> {html.escape(str(error))} The figure below is the last good one."
            self._status.value = f'<p role="alert" style="color:var(--jp-error-color1, #B00020)">{why}</p>'

    def _draw(self, values: Mapping[str, Any]) -> None:
        result = self.compute(**values)
        alt, caption, numbers = self.describe(result)
        figure = self.figure(result)
        figure.suptitle(self._settings(), fontsize=8, color="#555555")  # a static page has the picture alone
        picture = Picture(figure, alt)
        self.picture, self._numbers = picture, numbers
        self._view.value, self._status.value = picture.html(caption), ""

    def _settings(self) -> str:
        shown = {c.description: c.label if hasattr(c, "label") else f"{c.value:g}" for c in self.controls.values()}
        return "   ".join(f"{name}: {value}" for name, value in shown.items())

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={_rounded(value)!r}" for name, value in self.values.items())
        return f"{type(self).__name__}({values})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        """The widget where there is a kernel, the picture on a static page, text elsewhere."""
        live = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        picture = {} if self.picture is None else {"image/png": self.picture.base64}
        return {"application/vnd.jupyter.widget-view+json": live, **picture, "text/plain": repr(self)}


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value
