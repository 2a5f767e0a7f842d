"""Simulated B-mode frames with focal lesions of known outline, and things that look like them and are not.

Scatterers are complex Gaussian noise, weighted by an echogenicity map, convolved with a pulse whose lateral width grows
away from the focus; envelope, attenuation and gain, shadows and enhancement, clutter, noise; log compression; scan
conversion of a linear, convex or phased field (Bamber and Dickinson 1980; Wagner et al. 1983 for the statistics).
Everything is drawn from one generator: the same seed gives the same frame.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import fft, ndimage

SIZE = 256
DEPTHS, LINES = 320, 192


@dataclasses.dataclass
class Field:
    """What the transducer sees. Beam space is (depth r in mm, line u in -1..1)."""
    kind: str
    depth: float
    half: float  # mm for linear, radians for the others
    radius: float  # of the transducer's curvature, mm

    def to_mm(self, r, u):
        if self.kind == "linear":
            return u * self.half, r + 0 * u
        a = u * self.half
        return (r + self.radius) * np.sin(a), (r + self.radius) * np.cos(a) - self.radius

    def to_beam(self, x, z):
        if self.kind == "linear":
            return z, x / self.half
        return np.hypot(x, z + self.radius) - self.radius, np.arctan2(x, z + self.radius) / self.half

    def box(self):
        """x0, x1, z0, z1 in mm."""
        if self.kind == "linear":
            return -self.half, self.half, 0.0, self.depth
        side = (self.depth + self.radius) * np.sin(self.half)
        return -side, side, self.radius * (np.cos(self.half) - 1), self.depth


@dataclasses.dataclass
class Lesion:
    """A star-shaped outline about (x, z), mm: radius(angle) = a (1 + harmonics), flattened by `aspect`, turned by `turn`."""
    x: float
    z: float
    a: float
    aspect: float
    turn: float
    harmonics: np.ndarray  # [n, 3]: order, amplitude, phase

    def level(self, x, z):
        """Below 1 inside: distance from the centre over the outline's there."""
        dx, dz = x - self.x, z - self.z
        c, s = np.cos(self.turn), np.sin(self.turn)
        p, q = (dx * c + dz * s) / self.a, (dz * c - dx * s) / (self.a * self.aspect)
        angle = np.arctan2(q, p)
        outline = np.ones_like(angle)
        for order, amplitude, phase in self.harmonics:
            outline += amplitude * np.cos(order * angle + phase)
        return np.hypot(p, q) / outline

    @property
    def diameter(self):
        return 2 * self.a * np.sqrt(self.aspect)


def smooth_noise(rng, shape, cells):
    """Smooth unit noise: a coarse grid of normals, interpolated."""
    coarse = rng.standard_normal((max(2, cells[0]), max(2, cells[1]))).astype(np.float32)
    zoom = ndimage.zoom(coarse, (shape[0] / coarse.shape[0], shape[1] / coarse.shape[1]), order=1, mode="nearest", grid_mode=True)
    return zoom[:shape[0], :shape[1]] * 1.4


def draw_field(rng):
    kind = rng.choice(["linear", "convex", "phased"], p=[0.55, 0.33, 0.12])
    if kind == "linear":
        depth = float(np.exp(rng.uniform(np.log(25), np.log(70))))
        return Field(kind, depth, float(np.clip(rng.uniform(0.4, 0.75) * depth, 14, 32)), 0.0)
    depth = float(np.exp(rng.uniform(np.log(60), np.log(150))))
    if kind == "convex":
        return Field(kind, depth, float(rng.uniform(0.42, 0.7)), float(rng.uniform(30, 60)))
    return Field(kind, depth, float(rng.uniform(0.6, 0.8)), float(rng.uniform(0, 6)))


def draw_lesion(rng, field, mm_per_pixel, others):
    least = max(3.0, 7 * mm_per_pixel)
    most = min(40.0, 0.42 * field.depth)
    for _ in range(20):
        a = float(np.exp(rng.uniform(np.log(least), np.log(most)))) / 2
        r = rng.uniform(max(0.08 * field.depth, 1.1 * a), field.depth * 0.93 - a)
        x, z = field.to_mm(np.float64(r), np.float64(rng.uniform(-0.85, 0.85)))
        irregular = rng.choice([0.02, 0.06, 0.11], p=[0.4, 0.4, 0.2])
        orders = np.arange(2, 7)
        harmonics = np.stack([orders, irregular * rng.standard_normal(5) * 1.6 / orders ** 0.7, rng.uniform(0, 6.28, 5)], 1)
        lesion = Lesion(float(x), float(z), a / np.sqrt(0.8), float(rng.uniform(0.55, 1.0)), float(rng.normal(0, 0.4)), harmonics)
        apart = all(np.hypot(lesion.x - o.x, lesion.z - o.z) > 1.25 * (lesion.a + o.a) for o in others)
        reach = np.array([field.to_beam(lesion.x + s * lesion.a, lesion.z + t * lesion.a) for s in (-1, 1) for t in (-1, 1)])
        if apart and np.abs(reach[:, 1]).max() < 1.05 and reach[:, 0].max() < field.depth:
            return lesion
    return None


def edge(level, a, softness):
    """1 inside, 0 outside, over `softness` mm."""
    return np.clip((1 - level) * a / softness + 0.5, 0, 1)


def speckle(rng, amplitude, axial, lateral, looks, state=None, keep=0.0):
    """Envelope of scatterers seen through the pulse; `lateral` is the width in lines at every depth."""
    total = np.zeros(amplitude.shape, np.float32)
    f = fft.fftfreq(amplitude.shape[1]).astype(np.float32)
    g = fft.fftfreq(amplitude.shape[0]).astype(np.float32)
    across = np.exp(-2 * (np.pi * lateral[:, None] * f) ** 2).astype(np.float32)
    along = np.exp(-2 * (np.pi * axial * g) ** 2).astype(np.float32)[:, None]
    norm = np.sqrt(lateral[:, None] * axial).astype(np.float32)
    fields = []
    for n in range(looks):
        noise = rng.standard_normal((2, *amplitude.shape), dtype=np.float32)
        noise = noise[0] + 1j * noise[1]
        if state is not None:
            noise = keep * state[n] + np.sqrt(1 - keep ** 2) * noise
        fields.append(noise)
        seen = fft.ifft(fft.fft(noise * amplitude, axis=0) * along, axis=0)
        seen = fft.ifft(fft.fft(seen, axis=1) * across, axis=1)
        total += np.abs(seen) * norm * 2.2
    return total / looks, fields


#: How often lesions are darker than what surrounds them, brighter, and of its brightness with a dark rim.
KINDS = (0.62, 0.2, 0.18)
#: How often a frame has no lesion, one, two and so on.
COUNTS = (0.3, 0.47, 0.17, 0.06)
LESIONS_MAX = len(COUNTS) - 1


class Scene:
    """One piece of tissue with its lesions; `frame` draws it, moved and turned as a hand would."""

    def __init__(self, seed, lesions=None, kinds=KINDS):
        rng = self.rng = np.random.default_rng(seed)
        self.kinds = kinds
        field = self.field = draw_field(rng)
        x0, x1, z0, z1 = field.box()
        extent = rng.uniform(0.85, 1.0) * SIZE
        self.mm = max(x1 - x0, z1 - z0) / extent
        self.left = rng.uniform(0, SIZE - (x1 - x0) / self.mm)
        self.top = rng.uniform(0, SIZE - (z1 - z0) / self.mm)
        columns, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
        self.px, self.pz = (columns - self.left) * self.mm + x0, (rows - self.top) * self.mm + z0
        r, u = field.to_beam(self.px, self.pz)
        self.inside = (np.abs(u) <= 1) & (r >= 0) & (r <= field.depth)
        self.sample = np.stack([np.clip(r / field.depth, 0, 1) * (DEPTHS - 1), np.clip((u + 1) / 2, 0, 1) * (LINES - 1)]).astype(np.float32)
        self.r = (np.linspace(0, field.depth, DEPTHS)[:, None]).astype(np.float64)
        self.u = np.linspace(-1, 1, LINES)[None, :]
        self.bx, self.bz = field.to_mm(self.r, self.u)
        wanted = rng.choice(len(COUNTS), p=COUNTS) if lesions is None else lesions
        self.lesions = []
        for _ in range(wanted):
            lesion = draw_lesion(rng, field, self.mm, self.lesions)
            if lesion is not None:
                self.lesions.append(lesion)
        self._draw_tissue(rng)
        self.lesions = [lesion for lesion in self.lesions if self._shows(lesion)]
        self.looks_of = [self._look(rng, lesion) for lesion in self.lesions]
        self._draw_scanner(rng)
        self.state = None

    def _look(self, rng, lesion):
        kind = rng.choice(["hypo", "hyper", "rim"], p=self.kinds)
        core = {"hypo": rng.uniform(-20, -6), "hyper": rng.uniform(6, 12), "rim": rng.uniform(-4, 4)}[kind]
        rim = rng.uniform(-16, -9) if kind == "rim" or rng.random() < 0.15 else (rng.uniform(3, 8) if rng.random() < 0.15 else 0.0)
        tail = rng.choice([0.0, rng.uniform(2, 6), rng.uniform(-14, -4)], p=[0.5, 0.3, 0.2])
        return dict(core=core, rim=rim, width=rng.uniform(0.1, 0.2), tail=tail, sides=rng.uniform(0, 6) if rng.random() < 0.3 else 0.0,
                    soft=max(rng.uniform(0.15, 0.8), 0.6 * self.mm), texture=rng.uniform(0, 2.5), seed=int(rng.integers(1 << 31)),
                    bright=rng.uniform(6, 14) if rng.random() < 0.15 else 0.0)

    def _shows(self, lesion):
        """Not in a shadow, and not drawn over a vessel: an outline nobody could see teaches nothing."""
        near = lesion.level(self.bx, self.bz) < 1.3
        if not near.any():
            return False
        return self.gain[near].mean() > -5 and (self.db[near] < -18).mean() < 0.15

    def _draw_tissue(self, rng):
        d, shape = self.field.depth, (DEPTHS, LINES)
        # Layers run through the tissue and bend; each its own brightness and grain.
        z = self.r / d + 0.05 * smooth_noise(rng, shape, (3, 4)) * rng.uniform(0.2, 1.5) + 0 * self.u
        bounds = np.sort(rng.uniform(0.05, 1.0, rng.integers(1, 6)))
        levels = rng.uniform(-7, 5, len(bounds) + 1)
        db = levels[np.searchsorted(bounds, z)]
        for _ in range(rng.integers(1, 3)):
            cells = rng.integers(4, 28, 2)
            db = db + rng.uniform(0.4, 2.6) * smooth_noise(rng, shape, cells)
        # Fascia: thin bright lines, at boundaries and elsewhere, often only in part of the width.
        for at in list(bounds[rng.random(len(bounds)) < 0.6]) + list(rng.uniform(0.05, 0.95, rng.integers(0, 5))):
            width = rng.uniform(0.25, 0.8) / d
            slope = rng.uniform(-0.15, 0.15)
            line = np.exp(-0.5 * ((z + slope * self.u - at) / width) ** 2)
            part = 1.0 if rng.random() < 0.5 else np.clip(3 - np.abs(self.u - rng.uniform(-1, 1)) * rng.uniform(3, 9), 0, 1)
            db = db + rng.uniform(5, 15) * line * part
        if rng.random() < 0.3:  # muscle: fine stripes in one layer
            top = rng.uniform(0.05, 0.7)
            layer = np.clip(1 - np.abs(z - top - 0.1) / 0.1, 0, 1)
            db = db + layer * rng.uniform(3, 8) * np.sin(z * d * 6.28 / rng.uniform(1.2, 3.0) + rng.uniform(0, 3) * self.u)
        gain = np.zeros(shape)
        # Vessels: tubes along the plane, and round cross-sections too small to be a lesion; echo-free, with bright walls.
        for _ in range(rng.choice(4, p=[0.45, 0.3, 0.15, 0.1])):
            across = rng.uniform(1.5, 7.0)
            angle, cx, cz = rng.normal(0, 0.5), *self.field.to_mm(rng.uniform(0.15, 0.9) * d, rng.uniform(-0.8, 0.8))
            long = np.cos(angle) * (self.bx - cx) + np.sin(angle) * (self.bz - cz)
            side = -np.sin(angle) * (self.bx - cx) + np.cos(angle) * (self.bz - cz) + rng.normal(0, 0.01) * long ** 2
            half = rng.uniform(4, 30) * across / 2
            ends = np.clip((half - np.abs(long)) / across, 0, 1)
            if rng.random() < 0.3:
                across = min(across, rng.uniform(0.8, 2.2) * 7 * self.mm / 2)
                side, ends = np.hypot(long, side), 1.0
            tube = np.clip((across / 2 - np.abs(side)) / 0.4 + 0.5, 0, 1) * ends
            wall = np.exp(-0.5 * ((np.abs(side) - across / 2) / 0.35) ** 2) * ends * (np.abs(np.cos(angle)) if ends is not None else 1)
            db = db * (1 - tube) - rng.uniform(24, 40) * tube + rng.uniform(0, 8) * wall
        # Bone, gas and calcification: bright above, nothing below.
        for _ in range(rng.choice(3, p=[0.6, 0.3, 0.1])):
            at, r0 = rng.uniform(-1, 1), rng.uniform(0.05, 0.85) * d
            width = rng.uniform(0.02, 0.35)
            curve = rng.uniform(0, 0.3) * d * (self.u - at) ** 2
            column = np.clip((width - np.abs(self.u - at)) / (0.03 + 0.3 * width) + 0.5, 0, 1)
            below = np.clip((self.r - r0 - curve) / 0.6, 0, 1)
            line = np.exp(-0.5 * ((self.r - r0 - curve) / rng.uniform(0.3, 1.0)) ** 2)
            db = db + rng.uniform(8, 20) * line * column
            gain = gain - rng.uniform(8, 40) * column * below
        # Poor contact: dark from the skin down.
        if rng.random() < 0.25:
            at = rng.choice([-1, 1]) * rng.uniform(0.6, 1.1)
            gain = gain - rng.uniform(6, 30) * np.clip((rng.uniform(0.1, 0.4) - np.abs(self.u - at)) / 0.15 + 0.5, 0, 1)
        self.db, self.gain = db.astype(np.float32), gain.astype(np.float32)

    def _draw_scanner(self, rng):
        d = self.field.depth
        focus = rng.uniform(0.3, 0.8) * d
        line_mm = 2 * self.field.half / LINES if self.field.kind == "linear" else None
        wave = rng.uniform(0.13, 0.3) * (1 if self.field.kind == "linear" else 1.8)
        beam = wave * rng.uniform(1.6, 3.2) * np.maximum(0.6, np.hypot(1, (self.r[:, 0] - focus) / (0.45 * d)))
        per_line = line_mm if line_mm else np.maximum(0.05, (self.r[:, 0] + self.field.radius) * 2 * self.field.half / LINES)
        self.lateral = np.clip(beam / per_line / 2.35, 0.5, 12).astype(np.float32)
        self.axial = float(np.clip(wave * rng.uniform(1.2, 2.4) / (d / DEPTHS) / 2.35, 0.5, 6))
        slope = rng.uniform(-12, 5) * (self.r / d) + rng.uniform(0, 5) * np.exp(-((self.r - focus) / (0.25 * d)) ** 2)
        self.tgc = (slope + rng.uniform(0, 8) * np.exp(-self.r / rng.uniform(1.5, 6))).astype(np.float32)
        self.looks = int(rng.choice([1, 2, 3], p=[0.45, 0.35, 0.2]))
        self.floor = (rng.uniform(-48, -26) + rng.uniform(0, 14) * self.r / d).astype(np.float32)
        self.clutter = rng.uniform(-40, -24)
        self.range, self.level = rng.uniform(42, 72), rng.uniform(0.42, 0.68)
        self.curve, self.blur = rng.uniform(0.8, 1.25), rng.choice([0.0, 0.5, 0.8], p=[0.5, 0.3, 0.2])

    def frame(self, shift=(0.0, 0.0), turn=0.0, scale=1.0, contact=None, keep=0.0):
        """One frame, uint8, and the labels (0, or 1 + number of the lesion). Tissue is moved by `shift` mm and turned about the
        middle of the field, lesions are cut at another height (`scale`), `contact` dims lines (dB)."""
        rng, d = self.rng, self.field.depth
        c, s = np.cos(turn), np.sin(turn)
        mz = d / 2

        def back(x, z):
            x, z = x - shift[0], z - shift[1] - mz
            return c * x + s * z, c * z - s * x + mz

        moved = turn != 0 or shift != (0.0, 0.0)
        tx, tz = back(self.bx, self.bz) if moved else (self.bx, self.bz)
        if moved:
            r, u = self.field.to_beam(tx, tz)
            at = np.stack([np.clip(r / d, 0, 1) * (DEPTHS - 1), np.clip((u + 1) / 2, 0, 1) * (LINES - 1)])
            db = ndimage.map_coordinates(self.db, at, order=1, mode="nearest")
        else:
            db = self.db.copy()
        gain = self.gain + self.tgc
        labels = np.zeros((SIZE, SIZE), np.uint8)
        ix, iz = back(self.px, self.pz) if moved else (self.px, self.pz)
        for n, (lesion, look) in enumerate(zip(self.lesions, self.looks_of)):
            lesion = dataclasses.replace(lesion, a=lesion.a * scale)
            if scale < 0.35:
                continue
            level = lesion.level(tx, tz)
            whole = edge(level, lesion.a, look["soft"])
            core = edge(level / (1 - look["width"]), lesion.a, look["soft"]) if look["rim"] else whole
            around = float(np.mean(db[(level > 1) & (level < 1.5)])) if ((level > 1) & (level < 1.5)).any() else 0.0
            grain = look["texture"] * smooth_noise(np.random.default_rng(look["seed"]), db.shape, (24, 18))
            spot = look["bright"] * np.exp(-0.5 * (level / 0.25) ** 2)
            db = db * (1 - whole) + whole * (around + look["rim"] * (whole - core) + core * (look["core"] + grain + spot))
            # What lies below: enhancement or shadow inside the lesion's width, refraction at its sides.
            width = lesion.a * max(lesion.aspect, 0.8)
            lesion_r, lesion_u = self.field.to_beam(lesion.x + shift[0], lesion.z + shift[1])
            arc = width / (self.field.half if self.field.kind == "linear" else (lesion_r + self.field.radius) * self.field.half)
            behind = np.clip((self.r - lesion_r) / (0.5 * lesion.a + 0.5), 0, 1)
            column = np.clip((1 - np.abs(self.u - lesion_u) / arc) / 0.2 + 0.3, 0, 1)
            side = np.exp(-0.5 * ((np.abs(self.u - lesion_u) / arc - 1) / 0.08) ** 2)
            gain = gain + behind * (look["tail"] * column - look["sides"] * side) * (1 - whole)
            labels[(lesion.level(ix, iz) < 1) & self.inside] = n + 1
        if contact is not None:
            gain = gain + contact
        amplitude = (10 ** (db / 20)).astype(np.float32)
        envelope, fields = speckle(rng, amplitude, self.axial, self.lateral, self.looks, self.state, keep)
        self.state = fields if keep else None
        haze = ndimage.uniform_filter1d(envelope, 31, axis=1, mode="nearest")
        envelope = envelope + 10 ** (self.clutter / 20) * haze
        power = (envelope * 10 ** (gain / 20)) ** 2
        noise = rng.exponential(1.0, envelope.shape).astype(np.float32) * 10 ** (self.floor / 10)
        db = 10 * np.log10(power + noise + 1e-9)
        grey = np.clip(db / self.range + self.level, 0, 1) ** self.curve
        image = ndimage.map_coordinates(grey, self.sample, order=1, mode="nearest", prefilter=False)
        if self.blur:
            image = ndimage.gaussian_filter(image, self.blur)
        image = np.where(self.inside, image * 255, 0)
        return image.astype(np.uint8), labels


def sample(seed, kinds=KINDS):
    """A frame for training or evaluation: image, labels, scene."""
    scene = Scene(seed, kinds=kinds)
    image, labels = scene.frame()
    return image, labels, scene
