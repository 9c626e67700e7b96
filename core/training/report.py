"""The page a run leaves behind: one HTML file that needs nothing else, to be read on a desk or on a phone."""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from core.errors import UserError

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5c6670; --line: #dfe3e8; --page: #fbfbfa; --card: #ffffff;
  --accent: #3a5bc7; --good: #2b7a4b; --bad: #b3362d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --soft: #9aa4af; --line: #343b43; --page: #15181c;
  --card: #1d2126; --accent: #8da4ef; --good: #6cc08b; --bad: #ef8b82; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .7rem; }
article { border-top: 2px solid var(--line); margin-top: 3.5rem; padding-top: 2rem; }
article > h2 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h3 { font-size: 1.1rem; margin: 2.6rem 0 .7rem; }
a { color: var(--accent); }
p.headline { font-size: 2.4rem; line-height: 1.15; font-weight: 650; margin: .5rem 0 0;
  font-variant-numeric: tabular-nums; }
p.headline small { font-size: 1rem; font-weight: 400; color: var(--soft); }
p.caption, figcaption { color: var(--soft); font-size: .88rem; margin: .4rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .34rem 1.2rem .34rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; }
figure { margin: 0; }
figure > img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: .4rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .9rem; }
.gallery img { width: 100%; border-radius: 5px; border: 1px solid var(--line); }
.gallery .pixels { image-rendering: pixelated; }
.good { color: var(--good); } .bad { color: var(--bad); }
code, pre { font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
"""

SMALL = 96  # pixels; smaller images are enlarged without smoothing


class Page(NamedTuple):
    """What a written page holds; ``sections`` is its own markup, the others are plain text."""

    title: str
    headline: str
    subline: str
    sections: str


class Report:
    """A page of sections, written as one self-contained file.

    Titles, captions and cells are escaped; only ``html`` takes markup as it is.

    Args:
        title: Title of the page.
        headline: The figure a reader wants first, such as ``98.3 %``.
        subline: What that figure is.
    """

    def __init__(self, title: str, headline: str = "", subline: str = "") -> None:
        self.title = title
        self.headline = headline
        self.subline = subline
        self._sections: list[str] = []

    def figure(self, title: str, figure: Figure, caption: str = "") -> None:
        """Add a section with a matplotlib figure."""
        buffer = io.BytesIO()
        cut = None if figure.get_layout_engine() is not None else "tight"  # laid out already: not a second time
        figure.savefig(buffer, format="png", dpi=144, bbox_inches=cut)
        body = f'<figure><img src="{_data_uri(buffer.getvalue())}" alt="{html.escape(title)}"></figure>'
        self._add(title, body, caption)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
        """Add a section with a table; the columns are the keys of all rows in the order they appear.

        Floats are shown with four significant digits.
        """
        columns = list(dict.fromkeys(key for row in rows for key in row))
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
        lines = ["".join(f"<td>{_cell(row.get(name, ''))}</td>" for name in columns) for row in rows]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        self._add(title, f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>', caption)

    def facts(self, title: str, facts: Mapping[str, Any], caption: str = "") -> None:
        """Add a section with names and values, one a line."""
        body = "".join(f"<tr><th>{html.escape(str(key))}</th><td>{_cell(v)}</td></tr>" for key, v in facts.items())
        self._add(title, f'<div class="scroll"><table>{body}</table></div>', caption)

    def images(
        self,
        title: str,
        images: Iterable[tuple[Image.Image | np.ndarray, str] | tuple[Image.Image | np.ndarray, str, bool]],
        caption: str = "",
    ) -> None:
        """Add a gallery.

        Args:
            title: Title of the section.
            images: Pairs of image and text, or triples with a bool that colours the text: right or wrong. Arrays are
                uint8, ``(H, W)`` or ``(H, W, 3)``.
            caption: Text below.
        """
        cells = []
        for entry in images:
            image = entry[0] if isinstance(entry[0], Image.Image) else Image.fromarray(entry[0])
            buffer = io.BytesIO()
            image.save(buffer, format="png")
            pixels = ' class="pixels"' if max(image.size) < SMALL else ""
            mark = {(): "", (True,): ' class="good"', (False,): ' class="bad"'}[tuple(bool(v) for v in entry[2:])]
            text = html.escape(entry[1])
            cells.append(
                f'<figure><img{pixels} src="{_data_uri(buffer.getvalue())}" alt="{text}">'
                f"<figcaption{mark}>{text}</figcaption></figure>"
            )
        self._add(title, f'<div class="gallery">{"".join(cells)}</div>', caption)

    def text(self, title: str, text: str) -> None:
        """Add a section with plain text; lines are kept."""
        self._add(title, f"<pre>{html.escape(text)}</pre>", "")

    def html(self, title: str, markup: str) -> None:
        """Add a section with markup, taken as it is: escape what is not yours."""
        self._add(title, markup, "")

    def page(self, name: str, page: Page) -> None:
        """Add a whole page that was written before, one level below this one's title.

        Args:
            name: Of the place, for links within the page: ``#name``.
            page: From ``read_page``.
        """
        inside = page.sections.replace("<h2>", "<h3>").replace("</h2>", "</h3>")
        title = f"<h2>{html.escape(page.title)}</h2>{_headline(page.headline, page.subline)}"
        self._sections.append(f'<article id="{html.escape(name)}">{title}\n{inside}</article>\n')

    def render(self) -> str:
        """Return the page."""
        title = html.escape(self.title)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}</style></head>\n"
            f"<body><main><h1>{title}</h1>{_headline(self.headline, self.subline)}\n"
            f"{''.join(self._sections)}</main></body></html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the page; an older one is replaced at once or not at all."""
        write_atomically(path, self.render())

    def _add(self, title: str, body: str, caption: str) -> None:
        below = f'<p class="caption">{html.escape(caption)}</p>' if caption else ""
        self._sections.append(f"<section><h2>{html.escape(title)}</h2>{body}{below}</section>\n")


def read_page(path: Path) -> Page:
    """Read back a page that ``Report`` wrote.

    Raises:
        UserError: If there is none, or the file is something else.
    """
    if not path.is_file():
        raise UserError(f"no page at {path}; wanted the report.html of a run that ended")
    found = re.fullmatch(
        r"<!doctype html>\n<html .*?<body><main><h1>(?P<title>.*?)</h1>"
        r'(?:<p class="headline">(?P<headline>.*?)(?: <small>(?P<subline>.*?)</small>)?</p>)?\n'
        r"(?P<sections>.*)</main></body></html>\n",
        path.read_text(encoding="utf-8", errors="replace"),
        re.DOTALL,
    )
    if found is None:
        raise UserError(f"{path} is no page of a run, wanted one that a run wrote; move it away, or run again")
    title, headline, subline = (html.unescape(found[name] or "") for name in ("title", "headline", "subline"))
    return Page(title, headline, subline, found["sections"])


def curves(rows: Sequence[Mapping[str, float]]) -> Figure | None:
    """Draw the logged metrics over the optimizer step, ``train/x``, ``val/x`` and ``test/x`` in one panel.

    Args:
        rows: Records of the history, each with ``step`` and some metrics.

    Returns:
        The figure, or None if nothing was logged at two steps.
    """
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            stage, _, metric = name.partition("/")
            if metric and np.isfinite(value):
                series.setdefault(metric, {}).setdefault(stage, []).append((row["step"], value))
    series = {m: s for m, s in series.items() if any(len(points) > 1 for points in s.values())}
    if not series:
        return None
    columns = min(len(series), 3)
    lines = -(-len(series) // columns)
    figure = Figure(figsize=(4.0 * columns, 2.8 * lines), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    colours = {"train": "#9aa7d6", "val": "#2f4fb0", "test": "#c2571a"}
    for axis, (metric, stages) in zip(axes, series.items(), strict=False):
        for stage, points in stages.items():
            marker = "o" if len(points) < 30 else ""
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker=marker, markersize=3, linewidth=1.4, color=colours.get(stage), label=stage)
        axis.set_title(metric.replace("_", " "), fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(color="#e8e8e8", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if len(stages) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(series) :]:
        axis.set_visible(False)
    figure.supxlabel("optimizer step", fontsize=9)
    return figure


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _headline(headline: str, subline: str) -> str:
    if not headline:
        return ""
    small = f" <small>{html.escape(subline)}</small>" if subline else ""
    return f'<p class="headline">{html.escape(headline)}{small}</p>'


def _cell(value: Any) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
