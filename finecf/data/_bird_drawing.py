"""Draws one synthetic bird: a scene (pose, light, background, disturbances) plus the parts of a class give pixels
and a part map.

The canvas is RGBA and twice the size asked for. Alpha does not mean opacity here: every stroke writes the number of
its part there, so one pass of drawing gives the picture and the map of visible parts. Lengths are in bird units (the
body is about one unit long; x forward, y down) and go through an affine frame to pixels. A scene knows nothing of
classes, so the same scene with another class's parts is the same bird in the same place: the counterfactual picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from finecf.data._bird_classes import PARTS, BirdClass

Colour = tuple[float, float, float]
Points = np.ndarray
"""Float64 [N,2] of (x, y)."""

SUPERSAMPLING = 2
SHAPE_FLOOR = 0.4
"""A weakly marked beak or tail still has this share of its shape."""
PART_NUMBER = {part: number for number, part in enumerate(PARTS, start=1)}

PALETTE: dict[str, Colour] = {
    "black": (34, 32, 36),
    "charcoal": (72, 72, 78),
    "slate": (98, 112, 130),
    "grey": (140, 142, 148),
    "silver": (188, 191, 196),
    "white": (240, 238, 230),
    "cream": (232, 218, 186),
    "brown": (110, 80, 56),
    "rufous": (168, 88, 46),
    "buff": (208, 172, 120),
    "tan": (186, 150, 108),
    "olive": (122, 126, 66),
    "moss": (80, 94, 56),
    "yellow": (240, 208, 66),
    "orange": (228, 138, 50),
    "red": (206, 52, 44),
    "crimson": (160, 40, 56),
    "pink": (222, 148, 136),
    "blue": (66, 118, 196),
    "navy": (40, 60, 112),
    "sky": (130, 176, 216),
    "teal": (54, 132, 130),
    "violet": (116, 88, 158),
}


@dataclass(frozen=True)
class BirdSettings:
    """What the generator draws from. Any change changes `config_hash`; the shipped checkpoint belongs to the default
    values.

    Shares are probabilities; ranges are (low, high) of uniform draws; lengths are shares of the picture's side,
    angles degrees, noise in grey levels of 255. `marking` is the Beta distribution (a, b) of how strongly the
    telling attributes of a part are marked on one bird, and `marking_floor` the least of it: real birds, too, show a
    wing bar more or less clearly.
    """

    version: int = 1
    scale: tuple[float, float] = (0.40, 0.49)
    shift: float = 0.06
    pitch: tuple[float, float] = (-16.0, 16.0)
    head_turn: tuple[float, float] = (-16.0, 14.0)
    tail_turn: tuple[float, float] = (-14.0, 18.0)
    wing_turn: tuple[float, float] = (-7.0, 7.0)
    rare_pose: float = 0.10
    colour_jitter: float = 9.0
    marking: tuple[float, float] = (1.4, 1.1)
    marking_floor: float = 0.04
    size_jitter: float = 0.12
    light: tuple[float, float] = (0.78, 1.15)
    light_gradient: float = 0.22
    tint: float = 0.05
    noise: tuple[float, float] = (2.0, 12.0)
    blur: float = 0.25
    blur_radius: tuple[float, float] = (0.3, 0.75)
    occlusion: float = 0.45
    occluders: int = 2
    label_flip: float = 0.05


@dataclass(frozen=True)
class Scene:
    """Everything of one picture but its class: pose, size and place, light, marking strengths, and the seeds of
    textures and noise.

    Angles are radians; `scale` is pixels per bird unit over the picture's side, `centre` a share of the side;
    per-part values are in the order of `PARTS`.
    """

    seed: int
    flip: bool
    scale: float
    centre: tuple[float, float]
    pitch: float
    head_turn: float
    head_back: bool
    tail_turn: float
    wing_turn: float
    colour_shift: tuple[Colour, ...]
    marking: tuple[float, ...]
    part_size: tuple[float, ...]
    light: float
    light_gradient: tuple[float, float]
    tint: Colour
    noise: float
    blur: float
    occluders: int

    def to_dict(self) -> dict[str, object]:
        """As plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Scene:
        """The inverse of `to_dict`, also after a way through JSON (lists become tuples again)."""

        def tupled(value: object) -> object:
            return tuple(tupled(v) for v in value) if isinstance(value, list | tuple) else value

        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            raise ValueError(f"scene: expected the keys {sorted(expected)}, got {sorted(values)}")
        return cls(**{name: tupled(value) for name, value in values.items()})  # type: ignore[arg-type]


def sample_scene(seed: int, settings: BirdSettings) -> Scene:
    """The scene of a seed. Every value is drawn for every seed and in a fixed order, whatever the class will be."""
    rng = np.random.default_rng([seed, 0])
    s = settings

    def angle(bounds: tuple[float, float]) -> float:
        return math.radians(float(rng.uniform(*bounds)))

    flip = bool(rng.random() < 0.5)
    scale = float(rng.uniform(*s.scale))
    centre = (0.5 + float(rng.uniform(-s.shift, s.shift)), 0.5 + float(rng.uniform(-s.shift, s.shift)))
    pitch, head_turn, tail_turn, wing_turn = angle(s.pitch), angle(s.head_turn), angle(s.tail_turn), angle(s.wing_turn)
    rare, which_pose = float(rng.random()), float(rng.random())
    head_back = rare < s.rare_pose and which_pose < 0.4
    if rare < s.rare_pose and which_pose >= 0.4:
        pitch += math.radians(-42.0 if which_pose < 0.7 else 38.0)  # upright against a trunk, or bowed to the ground
    parts = len(PARTS)
    shift = rng.normal(0.0, s.colour_jitter, (parts, 3)).clip(-3 * s.colour_jitter, 3 * s.colour_jitter)
    marking = s.marking_floor + (1 - s.marking_floor) * rng.beta(*s.marking, size=parts)
    part_size = np.exp(rng.normal(0.0, s.size_jitter, parts).clip(-0.3, 0.3))
    gradient_size, direction = float(rng.uniform(0, s.light_gradient)), float(rng.uniform(0, 2 * math.pi))
    light = float(rng.uniform(*s.light))
    tint = rng.normal(0.0, s.tint, 3).clip(-0.12, 0.12)
    noise = float(rng.uniform(*s.noise))
    blurred, radius = float(rng.random()) < s.blur, float(rng.uniform(*s.blur_radius))
    occluded, how_many = float(rng.random()) < s.occlusion, int(rng.integers(1, s.occluders + 1))
    return Scene(
        seed=seed,
        flip=flip,
        scale=scale,
        centre=centre,
        pitch=pitch,
        head_turn=head_turn,
        head_back=head_back,
        tail_turn=tail_turn,
        wing_turn=wing_turn,
        colour_shift=tuple((float(r), float(g), float(b)) for r, g, b in shift),
        marking=tuple(float(v) for v in marking),
        part_size=tuple(float(v) for v in part_size),
        light=light,
        light_gradient=(gradient_size * math.cos(direction), gradient_size * math.sin(direction)),
        tint=(float(tint[0]), float(tint[1]), float(tint[2])),
        noise=noise,
        blur=radius if blurred else 0.0,
        occluders=how_many if occluded else 0,
    )


def spline(points: Sequence[tuple[float, float]], steps: int = 4, closed: bool = True) -> Points:
    """A Catmull-Rom curve through the points, `steps` samples a segment: float64 [N,2]."""
    p = np.asarray(points, dtype=np.float64)
    before, after = np.roll(p, 1, 0), np.roll(p, -1, 0)
    second = np.roll(p, -2, 0)
    if not closed:
        before[0], after[-1], second[-1], second[-2] = p[0], p[-1], p[-1], p[-1]
    t = np.linspace(0.0, 1.0, steps, endpoint=False)[None, :, None]
    a, b, c, d = before[:, None], p[:, None], after[:, None], second[:, None]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    flat = curve.reshape(-1, 2)
    return flat if closed else np.concatenate([flat[: (len(p) - 1) * steps], p[-1:]])


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, n: int = 20) -> Points:
    """Outline of an ellipse with half axes rx, ry, turned by `turn` radians: float64 [n,2]."""
    t = np.linspace(0.0, 2 * math.pi, n, endpoint=False)
    u, v = rx * np.cos(t), ry * np.sin(t)
    c, s = math.cos(turn), math.sin(turn)
    return np.stack([x + u * c - v * s, y + u * s + v * c], axis=1)


# fmt: off
# Outlines in bird units. The body's origin is its middle; head, beak, tail and wing have origins where they are joined.
BODY = spline([
    (0.47, -0.20), (0.49, 0.00), (0.38, 0.20), (0.14, 0.30), (-0.16, 0.26), (-0.42, 0.13), (-0.60, 0.04),
    (-0.62, -0.06),
    (-0.40, -0.15), (-0.12, -0.24), (0.10, -0.33), (0.24, -0.45), (0.42, -0.40),
])
BELLY = spline([
    (0.465, -0.17), (0.475, 0.00), (0.37, 0.185), (0.14, 0.285), (-0.16, 0.245), (-0.40, 0.115),
    (-0.10, 0.12), (0.14, 0.07),
    (0.29, -0.04), (0.36, -0.16),
])
BAND = spline([
    (0.475, -0.09), (0.487, 0.03), (0.40, 0.075), (0.27, 0.02), (0.23, -0.03), (0.30, -0.09), (0.39, -0.045),
])
SHADE = spline([
    (0.33, 0.235), (0.14, 0.30), (-0.16, 0.26), (-0.42, 0.13), (-0.58, 0.035), (-0.40, 0.06), (-0.14, 0.19),
    (0.12, 0.235),
])
HEAD = ellipse(0.10, -0.10, 0.205, 0.185, -0.1, 28)
CAP = spline([
    (-0.09, -0.13), (-0.04, -0.235), (0.08, -0.285), (0.20, -0.25), (0.285, -0.16), (0.17, -0.165), (0.04, -0.165),
])
MASK = spline([
    (-0.09, -0.06), (-0.02, -0.135), (0.12, -0.185), (0.26, -0.155), (0.30, -0.11), (0.20, -0.065), (0.06, -0.055),
])
WING = spline([
    (0.24, -0.08), (0.14, -0.20), (-0.06, -0.215), (-0.32, -0.13), (-0.60, -0.01), (-0.76, 0.085),
    (-0.50, 0.115), (-0.22, 0.145),
    (0.04, 0.12), (0.20, 0.04),
])
WING_TIP = spline([
    (-0.30, -0.02), (-0.60, 0.005), (-0.755, 0.083), (-0.50, 0.11), (-0.30, 0.125),
])
BARS = (
    spline([(0.07, -0.20), (0.115, -0.19), (0.10, -0.04), (0.045, 0.11), (-0.005, 0.105), (0.045, -0.05)]),
    spline([(-0.13, -0.19), (-0.08, -0.20), (-0.09, -0.03), (-0.15, 0.125), (-0.205, 0.12), (-0.145, -0.03)]),
)
PATCH = spline([
    (-0.02, -0.10), (-0.10, -0.13), (-0.26, -0.06), (-0.34, 0.02), (-0.24, 0.06), (-0.10, 0.02),
])
FEATHERS = (
    np.array([(-0.06, 0.03), (-0.30, 0.06), (-0.62, 0.085)]),
    np.array([(-0.08, -0.04), (-0.34, 0.01), (-0.66, 0.075)]),
    np.array([(-0.10, -0.11), (-0.34, -0.05), (-0.62, 0.045)]),
)
SPOTS = np.array([
    (0.41, -0.06), (0.34, 0.05), (0.43, 0.06), (0.24, 0.12), (0.34, 0.15), (0.14, 0.18), (0.23, 0.225), (0.03, 0.16),
    (0.08, 0.25), (-0.07, 0.19), (-0.03, 0.25), (-0.17, 0.17), (-0.16, 0.225), (0.40, -0.13),
])

# Upper edge from the base to the tip, then lower edge back; x in beak lengths, y in units. All shapes have eight
# points, so that a weakly marked beak lies between its shape and the plain one.
BEAKS: dict[str, tuple[float, Points]] = {
    "plain": (0.24, np.array([
        (0, -0.065), (0.35, -0.05), (0.7, -0.025), (1, 0.005),
        (1, 0.01), (0.7, 0.025), (0.35, 0.045), (0, 0.06),
    ])),
    "cone": (0.20, np.array([
        (0, -0.10), (0.35, -0.085), (0.7, -0.04), (1, 0.01),
        (1, 0.015), (0.7, 0.05), (0.35, 0.08), (0, 0.09),
    ])),
    "dagger": (0.32, np.array([
        (0, -0.05), (0.35, -0.035), (0.7, -0.018), (1, 0.0),
        (1, 0.004), (0.7, 0.016), (0.35, 0.03), (0, 0.045),
    ])),
    "hook": (0.26, np.array([
        (0, -0.095), (0.4, -0.105), (0.88, -0.06), (1.08, 0.08),
        (0.98, 0.14), (0.76, 0.045), (0.4, 0.055), (0, 0.075),
    ])),
    "decurved": (0.36, np.array([
        (0, -0.055), (0.4, -0.045), (0.8, 0.02), (1, 0.13),
        (0.97, 0.14), (0.75, 0.06), (0.4, 0.01), (0, 0.045),
    ])),
}
# x in tail lengths backwards from the rump, y in units: outline with seven points.
TAILS: dict[str, tuple[float, Points]] = {
    "square": (0.42, np.array([
        (0, -0.07), (0.5, -0.085), (1, -0.10), (1.0, 0.0),
        (1, 0.10), (0.5, 0.085), (0, 0.07),
    ])),
    "forked": (0.52, np.array([
        (0, -0.07), (0.5, -0.095), (1.1, -0.21), (0.45, 0.0),
        (1.1, 0.21), (0.5, 0.095), (0, 0.07),
    ])),
    "pointed": (0.45, np.array([
        (0, -0.07), (0.5, -0.095), (0.75, -0.08), (1.15, 0.0),
        (0.75, 0.08), (0.5, 0.095), (0, 0.07),
    ])),
    "long": (0.66, np.array([
        (0, -0.06), (0.5, -0.065), (1, -0.075), (1.03, 0.0),
        (1, 0.075), (0.5, 0.065), (0, 0.06),
    ])),
}
CRESTS: dict[str, Points] = {
    "swept": spline([
        (0.20, -0.25), (0.06, -0.31), (-0.12, -0.34), (-0.28, -0.33), (-0.16, -0.24), (-0.07, -0.12), (0.06, -0.16),
    ], steps=3),
    "fan": spline([
        (0.23, -0.22), (0.27, -0.40), (0.15, -0.52), (-0.01, -0.50), (-0.09, -0.36), (-0.06, -0.20), (0.08, -0.18),
    ], steps=3),
}
# fmt: on
NECK, RUMP, SHOULDER, BEAK_BASE, EYE = (0.30, -0.27), (-0.55, -0.005), (0.10, -0.05), (0.285, -0.085), (0.165, -0.125)
KEYPOINTS: dict[str, tuple[str, tuple[float, float]]] = {
    "body": ("bird", (-0.02, -0.262)),
    "head": ("head", (0.02, -0.12)),
    "beak": ("beak", (0.45, 0.0)),
    "eye": ("head", EYE),
    "crest": ("head", (0.02, -0.285)),
    "wing": ("wing", (-0.14, -0.0)),
    "tail": ("tail", (0.65, 0.04)),
    "breast": ("bird", (0.34, 0.10)),
    "legs": ("bird", (0.055, 0.38)),
}


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def _dim(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _frame(x: float, y: float, turn: float = 0.0, sx: float = 1.0, sy: float = 1.0) -> np.ndarray:
    """Affine 2 x 3: scale by (sx, sy), turn by `turn` radians, then move to (x, y)."""
    c, s = math.cos(turn), math.sin(turn)
    return np.array([[c * sx, -s * sy, x], [s * sx, c * sy, y]])


def _within(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The affine map that applies `inner`, then `outer`."""
    linear = outer[:, :2] @ inner
    linear[:, 2] += outer[:, 2]
    return linear


class _Pen:
    """Strokes in bird units on the canvas; each writes its colour and the number of its part."""

    def __init__(self, canvas: Image.Image, unit: float) -> None:
        self.draw, self.unit = ImageDraw.Draw(canvas), unit

    def _fill(self, colour: Colour, part: int) -> tuple[int, int, int, int]:
        r, g, b = (min(255, max(0, round(value))) for value in colour)
        return r, g, b, part

    def shape(self, frame: np.ndarray, points: Points, colour: Colour, part: int, edge: float = 0.0) -> None:
        """Fills the outline; `edge` > 0 strokes its border in a darker tone, so many units wide."""
        xy = (points @ frame[:, :2].T + frame[:, 2]).ravel().tolist()
        self.draw.polygon(xy, fill=self._fill(colour, part))
        if edge:
            self.draw.line(
                xy + xy[:2], fill=self._fill(_dim(colour, 0.62), part), width=max(1, round(edge * self.unit))
            )

    def line(self, frame: np.ndarray, points: Points, colour: Colour, part: int, width: float) -> None:
        """Strokes an open line, `width` units wide."""
        xy = (points @ frame[:, :2].T + frame[:, 2]).ravel().tolist()
        self.draw.line(xy, fill=self._fill(colour, part), width=max(1, round(width * self.unit)), joint="curve")


class _Frames:
    """The affine frames of a scene on a canvas of `side` pixels: of the bird, and of the parts that turn on their
    own.
    """

    def __init__(self, scene: Scene, side: int) -> None:
        self.unit = scene.scale * side
        mirror = -1.0 if scene.flip else 1.0
        place = _frame(scene.centre[0] * side, scene.centre[1] * side, 0.0, mirror * self.unit, self.unit)
        self.upright = place  # of the perch and of the legs' lower ends: the bird's place without its pitch
        self.bird = _within(place, _frame(0.0, 0.0, scene.pitch))
        self.size = dict(zip(PARTS, scene.part_size, strict=True))
        turned = -1.0 if scene.head_back else 1.0
        self.head = _within(self.bird, _frame(*NECK, scene.head_turn, turned))
        self.tail = _within(self.bird, _frame(*RUMP, scene.tail_turn, -1.0))
        self.wing = _within(self.bird, _frame(*SHOULDER, scene.wing_turn))

    def of(self, name: str) -> np.ndarray:
        """The frame a key point is given in."""
        if name == "beak":
            return _within(self.head, _frame(*BEAK_BASE, 0.0, BEAKS["plain"][0] * self.size["beak"], 1.0))
        if name == "tail":
            return _within(self.tail, _frame(0.0, 0.0, 0.0, TAILS["square"][0] * self.size["tail"], 1.0))
        return {"bird": self.bird, "head": self.head, "wing": self.wing}[name]


class _Painter:
    """Draws the parts of one class into one scene."""

    def __init__(self, pen: _Pen, frames: _Frames, scene: Scene, bird: BirdClass) -> None:
        self.pen, self.frames, self.bird = pen, frames, bird
        self.shift = dict(zip(PARTS, scene.colour_shift, strict=True))
        self.marking = dict(zip(PARTS, scene.marking, strict=True))
        self.pitch = scene.pitch

    def colour(self, part: str, name: str) -> Colour:
        """A named colour with the jitter of its part."""
        base, shift = PALETTE[name], self.shift[part]
        return (base[0] + shift[0], base[1] + shift[1], base[2] + shift[2])

    def marked(self, part: str, name: str, ground: Colour) -> Colour:
        """A named colour on `ground`, as strong as this bird's marking of the part."""
        return _mix(ground, self.colour(part, name), self.marking[part])

    def shaping(self, part: str) -> float:
        """How far the outline of a part is from the plain one."""
        return SHAPE_FLOOR + (1 - SHAPE_FLOOR) * self.marking[part]

    def paint(self) -> None:
        """All parts, from the farthest to the nearest."""
        for part in (
            self.tail,
            self.legs,
            self.body,
            self.breast,
            self.wing,
            self.crest,
            self.head,
            self.beak,
            self.eye,
        ):
            part()

    def tail(self) -> None:
        shape, colour_name, tip_name = self.bird.parts["tail"]
        number, frame, k = PART_NUMBER["tail"], self.frames.tail, self.shaping("tail")
        (plain_length, plain), (length, outline) = TAILS["square"], TAILS[shape]
        outline = plain + (outline - plain) * k
        scale = np.array([(plain_length + (length - plain_length) * k) * self.frames.size["tail"], 1.0])
        colour = self.colour("tail", colour_name)
        self.pen.shape(frame, outline * scale, colour, number, edge=0.018)
        for y in (-0.4, 0.4):
            middle = np.array([(0.1, 0.06 * y), (0.5, 0.09 * y), (0.8, 0.1 * y)]) * scale
            self.pen.line(frame, middle, _dim(colour, 0.75), number, 0.012)
        if tip_name != colour_name:
            ends = outline[2:5]
            tip = np.concatenate([ends, np.stack([ends[::-1, 0] - 0.24, ends[::-1, 1] * 0.97], axis=1)])
            self.pen.shape(frame, tip * scale, self.marked("tail", tip_name, colour), number)

    def legs(self) -> None:
        number = PART_NUMBER["legs"]
        colour = self.marked("legs", self.bird.parts["legs"][0], PALETTE["charcoal"])
        c, s = math.cos(self.pitch), math.sin(self.pitch)
        for x, shade in ((0.12, 0.8), (0.01, 1.0)):
            hip = np.array([x * c - 0.24 * s, x * s + 0.24 * c])  # turns with the body; the foot stays on the perch
            foot = np.array([x + 0.02, 0.50])
            knee = (hip + foot) / 2 + np.array([-0.035, 0.0])
            tone = _dim(colour, shade)
            self.pen.line(self.frames.upright, np.stack([hip, knee, foot]), tone, number, 0.036)
            for dx, dy in ((0.10, 0.015), (0.07, 0.045), (-0.06, 0.03)):
                self.pen.line(self.frames.upright, np.stack([foot, foot + np.array([dx, dy])]), tone, number, 0.03)

    def body(self) -> None:
        number = PART_NUMBER["body"]
        colour = self.colour("body", self.bird.parts["body"][0])
        self.pen.shape(self.frames.bird, BODY, colour, number, edge=0.02)
        self.pen.shape(self.frames.bird, SHADE, _dim(colour, 0.78), number)

    def breast(self) -> None:
        colour_name, pattern, mark_name = self.bird.parts["breast"]
        number, frame = PART_NUMBER["breast"], self.frames.bird
        colour = self.colour("breast", colour_name)
        self.pen.shape(frame, BELLY, colour, number)
        mark = self.marked("breast", mark_name, colour)
        if pattern == "band":
            self.pen.shape(frame, BAND, mark, number)
        elif pattern == "spots":
            for x, y in SPOTS:
                self.pen.shape(frame, ellipse(x, y, 0.029, 0.029, n=8), mark, number)
        elif pattern == "streaks":
            for x, y in SPOTS:
                self.pen.line(frame, np.array([(x + 0.034, y - 0.034), (x - 0.034, y + 0.034)]), mark, number, 0.032)

    def wing(self) -> None:
        colour_name, pattern, mark_name = self.bird.parts["wing"]
        number = PART_NUMBER["wing"]
        frame = _within(self.frames.wing, _frame(-SHOULDER[0], -SHOULDER[1]))
        colour = self.colour("wing", colour_name)
        self.pen.shape(frame, WING, colour, number, edge=0.02)
        self.pen.shape(frame, WING_TIP, _dim(colour, 0.74), number)
        for feather in FEATHERS:
            self.pen.line(frame, feather, _dim(colour, 0.66), number, 0.014)
        mark = self.marked("wing", mark_name, colour)
        for bar in BARS[: {"one bar": 1, "two bars": 2}.get(pattern, 0)]:
            self.pen.shape(frame, bar, mark, number)
        if pattern == "patch":
            self.pen.shape(frame, PATCH, mark, number)

    def crest(self) -> None:
        shape, colour_name = self.bird.parts["crest"]
        if shape == "none":
            return
        # A weakly marked crest lies flat: its points are drawn towards the crown.
        lift = 0.45 + 0.55 * self.marking["crest"] * self.frames.size["crest"]
        crown = np.array([0.06, -0.20])
        outline = crown + (CRESTS[shape] - crown) * lift
        self.pen.shape(self.frames.head, outline, self.colour("crest", colour_name), PART_NUMBER["crest"], edge=0.016)

    def head(self) -> None:
        colour_name, pattern, mark_name = self.bird.parts["head"]
        number, frame = PART_NUMBER["head"], self.frames.head
        colour = self.colour("head", colour_name)
        self.pen.shape(frame, HEAD, colour, number)
        self.pen.shape(frame, ellipse(0.13, -0.03, 0.12, 0.075, -0.2, 16), _mix(colour, PALETTE["white"], 0.13), number)
        if pattern != "plain":
            self.pen.shape(frame, {"cap": CAP, "mask": MASK}[pattern], self.marked("head", mark_name, colour), number)

    def beak(self) -> None:
        shape, colour_name = self.bird.parts["beak"]
        number, k = PART_NUMBER["beak"], self.shaping("beak")
        (plain_length, plain), (length, outline) = BEAKS["plain"], BEAKS[shape]
        length = (plain_length + (length - plain_length) * k) * self.frames.size["beak"]
        frame = _within(self.frames.head, _frame(*BEAK_BASE))
        colour = self.marked("beak", colour_name, PALETTE["grey"])
        scale = np.array([length, 1.0])
        outline = (plain + (outline - plain) * k) * scale
        self.pen.shape(frame, outline, colour, number, edge=0.012)
        gape = np.stack([(outline[1] + outline[6]) / 2, (outline[2] + outline[5]) / 2])
        self.pen.line(frame, np.concatenate([[(0.0, 0.0)], gape]), _dim(colour, 0.55), number, 0.012)

    def eye(self) -> None:
        iris, ring = self.bird.parts["eye"]
        number, frame, size = PART_NUMBER["eye"], self.frames.head, self.frames.size["eye"]
        ground = self.colour("head", self.bird.parts["head"][0])
        self.pen.shape(frame, ellipse(*EYE, 0.080 * size, 0.074 * size, n=18), self.marked("eye", ring, ground), number)
        self.pen.shape(frame, ellipse(*EYE, 0.042 * size, 0.042 * size, n=14), self.colour("eye", iris), number)
        self.pen.shape(frame, ellipse(EYE[0] + 0.014, EYE[1] - 0.014, 0.012, 0.012, n=6), PALETTE["white"], number)


_SKIES = ("sky", "silver", "grey", "cream")
_GREENS = ("moss", "olive", "teal", "tan")


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    """A blurred landscape: coarse colour noise over a tone from above and a tone from below."""
    above, below = PALETTE[_SKIES[int(rng.integers(4))]], PALETTE[_GREENS[int(rng.integers(4))]]
    horizon = float(rng.uniform(0.1, 0.9))
    blend = np.clip((np.linspace(0, 1, 12) - horizon) * 2.2 + 0.5, 0, 1)[:, None, None]
    field = (
        (1 - blend) * np.array(above)
        + blend * np.array(below)
        + rng.normal(0, 15, (12, 12, 1))
        + rng.normal(0, 7, (12, 12, 3))
    )
    coarse = Image.fromarray(np.clip(field, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    coarse.putalpha(0)
    return coarse


def _leaf(pen: _Pen, side: int, rng: np.random.Generator, x: float, y: float, length: float) -> None:
    """A leaf with its stem at (x, y), shares of the side."""
    turn = float(rng.uniform(0, 2 * math.pi))
    green = _mix(
        PALETTE["moss"],
        PALETTE[("olive", "yellow", "rufous", "teal")[int(rng.integers(4))]],
        float(rng.uniform(0.0, 0.5)),
    )
    frame = _frame(x * side, y * side, turn, length * side, length * side)
    blade = spline([(0, 0), (0.3, -0.2), (0.65, -0.19), (1, 0), (0.65, 0.19), (0.3, 0.2)], 3)
    pen.shape(frame, blade, green, 0)
    pen.line(frame, np.array([(0.0, 0.0), (0.9, 0.0)]), _dim(green, 0.75), 0, 0.012)


def _branch(
    pen: _Pen,
    frame: np.ndarray,
    rng: np.random.Generator,
    start: tuple[float, float],
    end: tuple[float, float],
    width: float,
) -> None:
    """A branch from start to end in the units of `frame`, with a lighter upper side."""
    brown = _mix(PALETTE["brown"], PALETTE["grey"], float(rng.uniform(0.0, 0.6)))
    along = np.linspace(np.array(start), np.array(end), 5)
    along[1:-1] += rng.normal(0, 0.02, (3, 2))
    pen.line(frame, along, _dim(brown, 0.8), 0, width)
    pen.line(frame, along - (0, width * 0.18), _dim(brown, 1.12), 0, width * 0.4)


def _distractors(pen: _Pen, frames: _Frames, side: int, rng: np.random.Generator) -> None:
    """What lies behind the bird: out-of-focus lights, branches, leaves, and the perch under its feet."""
    for _ in range(int(rng.integers(2, 6))):
        x, y = rng.uniform(0, side, 2).tolist()
        radius = float(rng.uniform(0.03, 0.12)) * side
        tone = _mix(PALETTE[_GREENS[int(rng.integers(4))]], PALETTE["white"], float(rng.uniform(0.1, 0.6)))
        pen.shape(_frame(x, y, 0.0, radius, radius), ellipse(0, 0, 1, 1, n=16), tone, 0)
    whole = _frame(0.0, 0.0, 0.0, side, side)
    for _ in range(int(rng.integers(0, 3))):
        ends = rng.uniform(-0.1, 1.1, 4)
        _branch(pen, whole, rng, (float(ends[0]), -0.1), (float(ends[1]), 1.1), float(rng.uniform(0.02, 0.07)))
    for _ in range(int(rng.integers(2, 7))):
        _leaf(pen, side, rng, float(rng.random()), float(rng.random()), float(rng.uniform(0.08, 0.2)))
    tilt = rng.uniform(-0.08, 0.08, 2)
    _branch(pen, frames.upright, rng, (-2.6, 0.57 + float(tilt[0])), (2.6, 0.57 + float(tilt[1])), 0.11)


def _occluders(pen: _Pen, frames: _Frames, side: int, rng: np.random.Generator, count: int) -> None:
    """Leaves and twigs in front of the bird."""
    for _ in range(count):
        u, v = float(rng.uniform(-0.8, 0.6)), float(rng.uniform(-0.45, 0.35))
        x, y = (frames.bird[:, :2] @ (u, v) + frames.bird[:, 2]) / side
        if rng.random() < 0.7:
            for _ in range(2):
                _leaf(pen, side, rng, float(x), float(y), float(rng.uniform(0.12, 0.24)))
        else:
            lean = float(rng.uniform(-0.5, 0.5))
            whole = _frame(0.0, 0.0, 0.0, side, side)
            _branch(pen, whole, rng, (float(x) - lean, -0.1), (float(x) + lean, 1.1), float(rng.uniform(0.02, 0.045)))


def _expose(picture: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Light, tint and sensor noise: uint8 [H,W,3] to uint8 [H,W,3]."""
    height, width = picture.shape[:2]
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light = np.float32(scene.light) + np.float32(scene.light_gradient[0]) * x + np.float32(scene.light_gradient[1]) * y
    gain = light[:, :, None] * (1 + np.array(scene.tint, dtype=np.float32))
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    noise *= np.float32(scene.noise)
    noise += picture * gain
    noise += np.float32(0.5)
    np.clip(noise, 0, 255, out=noise)
    return noise.astype(np.uint8)


def draw_bird(scene: Scene, bird: BirdClass, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws a class into a scene.

    Returns the picture, uint8 [size,size,3], and the part map, uint8 [size,size]: the number of the part that is
    visible at each pixel (`PART_NUMBER`), 0 where there is none.
    """
    side = size * SUPERSAMPLING
    # One stream each for background, occluders and noise: none depends on how much of another was drawn, nor on the
    # class.
    behind, front, sensor = (np.random.default_rng([scene.seed, stream]) for stream in (1, 2, 3))
    canvas = _background(behind, side)
    frames = _Frames(scene, side)
    _distractors(_Pen(canvas, frames.unit), frames, side, behind)
    _Painter(_Pen(canvas, frames.unit), frames, scene, bird).paint()
    _occluders(_Pen(canvas, frames.unit), frames, side, front, scene.occluders)
    part_map = np.asarray(canvas.getchannel("A"))[::SUPERSAMPLING, ::SUPERSAMPLING].copy()
    picture = canvas.convert("RGB").reduce(SUPERSAMPLING)
    if scene.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(scene.blur * size / 128))
    return _expose(np.asarray(picture), scene, sensor), part_map


def key_points(scene: Scene, part_map: np.ndarray) -> dict[str, tuple[float, float] | None]:
    """The pixel (x, y) of each part's key point, or None where the part is not seen within one pixel of it."""
    size = part_map.shape[0]
    frames = _Frames(scene, size)
    points: dict[str, tuple[float, float] | None] = {}
    for part, (frame_name, at) in KEYPOINTS.items():
        frame = frames.of(frame_name)
        x, y = frame[:, :2] @ at + frame[:, 2]
        column, row = math.floor(x), math.floor(y)
        near = part_map[max(row - 1, 0) : max(row + 2, 0), max(column - 1, 0) : max(column + 2, 0)]
        points[part] = (float(x), float(y)) if (near == PART_NUMBER[part]).any() else None
    return points
