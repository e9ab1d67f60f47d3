"""The HTML report: one file that holds the table, the totals and every figure."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

EMBEDDED_WIDTH = 1100
EMBEDDED_ANIMATIONS = 24
"""So many animations of one part are in the page itself: each takes some hundred kilobytes."""
MEANINGS = {
    "image": "the image explained; its name leads to its figure",
    "is": "the true class, which the network should have named",
    "asked": "the class asked for: what would make the network name it?",
    "explained": "the class explained: the one that the network named",
    "taken for": "the class that the network named instead",
    "named": "the class that the network named",
    "flip": "whether the network names the class of the second column once the cells are replaced",
    "edits": "how many cells of the feature map were replaced, one after the other",
    "needed": "how many of these replacements are enough; the others can be taken back and the answer stays flipped",
    "on parts": "the share of the edits that lie on a part in which the two classes really differ",
    "ms": "milliseconds for the explanation, the network's own forwards apart",
    "regions": "how many first regions have the best score, and how many there are",
    "area": "the share of the image that the regions of the best score cover",
    "enough": "how many first regions, shown alone, the network takes for the class of the second column",
    "whole": "the probability of the class of the second column for the whole image",
    "alone": "the same probability where only the regions of the best score are shown",
    "enough alone": "images of which some first regions, shown alone, are taken for the class of the second column",
    "parts at": "the share of the image that stands before the parts in which the two classes really differ; "
    "50% is chance, and less is better",
    "insertion": "the mean probability while the regions are shown one after the other, by the share of the image; "
    "large is good",
    "deletion": "the mean probability while the regions are hidden one after the other; small is good",
    "first k": "the first step beyond the boundary (k = 0.5) whose drawn image the network takes for the class of the "
    "second column; k = 1 is the mirror image",
    "k*": "the same for the features that the images are drawn from",
    "k = 1": "whether the network takes the mirror image, k = 1, for the class of the second column",
    "change": "how far a pixel moved on average, in the units that the network takes, from the image redrawn at k = 0",
    "gap": "how far apart the probabilities of the drawn images and of their features are, on average along k; small "
    "is good",
    "latent error": "the same for the features themselves: their mean absolute difference; small is good",
    "at k = 0": "what the image is taken for when it is only redrawn, with nothing changed: wanted is the other class "
    "already, another a third one; the row says little then",
    "trained": "whether the decoder was trained on this pair of classes",
    "already at k = 0": "images that the network takes for the class of the second column as soon as they are redrawn, "
    "before anything is changed: the decoder's fault",
    "another class at k = 0": "images that are taken for a third class as soon as they are redrawn",
    "untrained pairs": "images whose two classes the decoder was not trained on: what it draws may be of neither",
    "forwards": "how many images, most of them with regions hidden, went through the network; a gradient counts as one",
}
"""What the columns and totals of a table mean, for a reader who has never heard of the method."""


@dataclass
class Row:
    """One explanation in the report: the values of the table's columns, and the files of its figure and its animation
    (a GIF), if any.
    """

    values: Sequence[str]
    figure: Path | None = None
    animation: Path | None = None


@dataclass
class Report:
    """What a report says: a title, a paragraph, the totals, and a table with a figure for each row.

    `columns` names the values of every `Row`; `guide` says how to read a figure; `parts` are reports that follow on the
    same page.
    """

    title: str
    intro: str
    columns: Sequence[str]
    totals: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    guide: str = ""
    parts: list[Report] = field(default_factory=list)

    def write(self, path: str | Path) -> Path:
        """Write the report as one HTML file that refers to no other."""
        from jinja2 import Environment

        source = files("finecf.report").joinpath("templates", "report.html").read_text(encoding="utf-8")
        template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
        text = template.render(
            reports=[self, *self.parts], embedded=_embedded, moving=_moving, most_moving=EMBEDDED_ANIMATIONS
        )
        path = Path(path)
        path.write_text(text, encoding="utf-8")
        return path

    @property
    def legend(self) -> dict[str, str]:
        """The columns and totals that need a word, and what they mean."""
        shown = {*self.columns, *self.totals}
        return {name: meaning for name, meaning in MEANINGS.items() if name in shown}


def _embedded(figure: Path) -> str:
    """A figure's file as a data address: a smaller JPEG, since a report may hold a hundred of them."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(figure) as picture:
        picture.thumbnail((EMBEDDED_WIDTH, 4 * EMBEDDED_WIDTH))
        picture.convert("RGB").save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _moving(animation: Path) -> str:
    """An animation's file as a data address."""
    return "data:image/gif;base64," + base64.b64encode(animation.read_bytes()).decode("ascii")
