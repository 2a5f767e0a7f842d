"""Made MR of made brains: contrasts from tissue maps, tumours grown into them, and what a scanner does to both.

The idea is SynthSeg's (Billot et al. 2023): a network that has seen every intensity a tissue can have in a contrast needs no real images of it.
Here each contrast keeps its physics: fluid is dark on T1 and FLAIR and bright on T2, oedema is bright on T2 and FLAIR, a rim enhances on T1c only.
All arrays run [z, y, x] to S, P and L.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from . import brain_maps

CHANNELS = ("T1", "T1c", "T2", "FLAIR")
LABELS = ("background", "necrotic or non-enhancing core", "oedema", "enhancing tumour")
CLIP = 6.0


def load(work, names=None):
    """The tissue maps, as float tensors [7, z, y, x] in 0..1, by name."""
    paths = sorted((Path(work) / "brain").glob("*.npz"))
    return {p.stem: torch.from_numpy(np.load(p)["maps"]).float() / 255 for p in paths if names is None or p.stem in names}


class Dice:
    """Random numbers of one sample."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.torch = torch.Generator().manual_seed(int(self.rng.integers(2 ** 62)))

    def uniform(self, low, high):
        return float(self.rng.uniform(low, high))

    def chance(self, p):
        return bool(self.rng.random() < p)

    def white(self, shape):
        return torch.randn(shape, generator=self.torch)

    def smooth(self, shape, spacing, wavelength_mm, count=1):
        """`count` smooth random fields of standard deviation about 1 that change over `wavelength_mm`."""
        coarse = [max(3, int(np.ceil(n * spacing / wavelength_mm)) + 1) for n in shape]
        noise = self.white([1, count] + coarse)
        return functional.interpolate(noise, size=list(shape), mode="trilinear", align_corners=True)[0] * 1.4


def grid_of(shape, spacing):
    """Places of the voxels in mm from the middle, [z, y, x, 3]."""
    axes = [(torch.arange(n) - (n - 1) / 2) * spacing for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def rotation(angles):
    out = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.eye(3)
        a, b = [n for n in range(3) if n != axis]
        turn[a, a] = turn[b, b] = c
        turn[a, b], turn[b, a] = -s, s
        out = out @ turn
    return out


def warp(maps, places, dice, elastic_mm, spacing, turn=0.26, scale=(0.84, 1.16), shift_mm=0.0, push=None):
    """The maps of another head: turned, scaled, mirrored at times, bent, and pushed aside where a mass grows."""
    shape = places.shape[:3]
    affine = rotation([dice.uniform(-turn, turn) for _ in range(3)]) @ np.diag([dice.uniform(*scale) for _ in range(3)])
    if dice.chance(0.5):
        affine[:, 2] *= -1
    p = places @ torch.tensor(affine.T, dtype=torch.float32)
    p = p + torch.tensor([dice.uniform(-shift_mm, shift_mm) for _ in range(3)])
    bend = dice.smooth(shape, spacing, 45, 3) * elastic_mm + dice.smooth(shape, spacing, 22, 3) * (elastic_mm * 0.35)
    p = p + bend.permute(1, 2, 3, 0)
    if push is not None:
        p = p + push @ torch.tensor(affine.T, dtype=torch.float32)
    size = torch.tensor([(n - 1) / 2 * brain_maps.SPACING_MM for n in maps.shape[1:]])
    q = (p / size).flip(-1)  # grid_sample wants x, y, z
    return functional.grid_sample(maps[None], q[None], mode="bilinear", padding_mode="zeros", align_corners=True)[0]


@dataclass
class Tumour:
    """A lesion: how far each part reaches (1 = its edge), and how wide the mass pushes."""

    oedema: torch.Tensor
    core: torch.Tensor
    kind: str
    rim: float
    radius_mm: float


def place_tumour(places, dice, where):
    """A lesion around `where` (mm from the middle), before tissue has its say."""
    shape, spacing = places.shape[:3], float(places[1, 0, 0, 0] - places[0, 0, 0, 0])
    kind = dice.rng.choice(["ring", "solid", "low grade", "low grade patchy"], p=[0.42, 0.14, 0.30, 0.14])
    radius = float(np.exp(dice.uniform(np.log(9), np.log(45))))
    turn = rotation([dice.uniform(-3, 3) for _ in range(3)]) @ np.diag([dice.uniform(0.75, 1.35) for _ in range(3)])
    d = ((places - torch.tensor(where, dtype=torch.float32)) @ torch.tensor(turn, dtype=torch.float32)).norm(dim=-1)
    rough = dice.uniform(0.1, 0.4)
    ragged = torch.exp(rough * dice.smooth(shape, spacing, max(10, radius * 0.8))[0] + 0.4 * rough * dice.smooth(shape, spacing, 9)[0])
    share = {"ring": (0.35, 0.8), "solid": (0.3, 0.8), "low grade": (0.6, 1.05), "low grade patchy": (0.3, 0.9)}[kind]
    core_radius = max(5.0, radius * dice.uniform(*share))
    knobbly = torch.exp(dice.uniform(0.05, 0.3) * dice.smooth(shape, spacing, max(8, core_radius * 0.8))[0])
    offset = torch.tensor([dice.uniform(-0.2, 0.2) * radius for _ in range(3)])
    core = (places - torch.tensor(where, dtype=torch.float32) - offset).norm(dim=-1) / core_radius * knobbly
    return Tumour(d / radius * ragged, core, str(kind), float(np.clip(dice.uniform(2.0, 7.0) / core_radius, 0.08, 0.8)), radius)


def pushed(places, where, radius, strength):
    """How far tissue around a mass is displaced, as the map is read: [z, y, x, 3] mm."""
    away = places - torch.tensor(where, dtype=torch.float32)
    d = away.norm(dim=-1, keepdim=True).clamp(min=1.0)
    return -away / d * (strength * radius * torch.exp(-(d / (1.6 * radius)) ** 2)) * (d / radius).clamp(max=1)


def means_of(dice):
    """Mean intensities, white matter = 1: rows as CHANNELS, columns white, grey, fluid, bone, fat, soft, core, oedema, enhancing, necrosis."""
    u = dice.uniform
    grey, fluid = u(0.6, 0.96), u(0.15, 0.5)
    lesion = u(0.5, 0.85)
    t1 = [1, grey, fluid, u(0, 0.2), u(1.2, 2.5), u(0.4, 1.0), min(lesion, u(0.45, 0.8)), min(1, lesion * u(0.95, 1.15)), u(0.5, 0.9), u(0.25, 0.6)]
    t1c = [v * u(0.95, 1.05) for v in t1]
    t1c[0], t1c[1], t1c[8] = 1, min(0.99, t1[1] * u(0.97, 1.06)), u(1.12, 2.3)
    t1c[6] *= u(0.95, 1.15)
    t1c[5] *= u(1.0, 1.5)
    grey, bright = u(1.1, 1.7), u(1.2, 2.4)
    bright = max(bright, grey * 1.08)
    t2 = [1, grey, max(grey * 1.4, u(1.9, 3.6)), u(0, 0.3), u(0.8, 3.0), u(0.4, 1.2), bright * u(0.9, 1.25), bright, u(1.1, 2.2), u(1.4, 3.2)]
    grey, bright = u(1.03, 1.5), u(1.2, 2.6)
    bright = max(bright, grey * 1.12)
    flair = [1, grey, u(0.08, 0.65), u(0, 0.2), u(0.6, 2.2), u(0.4, 1.1), bright * u(0.75, 1.12), bright, u(1.1, 2.3), u(0.3, 2.0)]
    return torch.tensor([t1, t1c, t2, flair])


def tubes(dice, shape, spacing, width):
    """Curved threads, as vessels are: where two smooth fields are both zero."""
    a, b = dice.smooth(shape, spacing, 16), dice.smooth(shape, spacing, 16)
    return torch.exp(-(a[0] ** 2 + b[0] ** 2) / width ** 2)


def slices(dice, count, spacing, thickness_mm, step_mm, blur_mm, shift_mm):
    """One axis of a scan and of its way back onto the grid, as a matrix: blur, slice profile, slice distance, linear interpolation."""
    at = torch.arange(count, dtype=torch.float32) * spacing
    if step_mm <= spacing * 1.05:
        sigma = max(blur_mm, 0.35 * spacing)
        matrix = torch.exp(-0.5 * ((at[:, None] + shift_mm - at[None]) / sigma) ** 2)
        return matrix / matrix.sum(1, keepdim=True).clamp(min=1e-6)
    centres = torch.arange(-dice.uniform(0, step_mm), count * spacing + step_mm, step_mm)
    sigma = 0.4 * spacing
    inside = torch.sigmoid((thickness_mm / 2 - (centres[:, None] - at[None]).abs()) / sigma)
    inside = inside / inside.sum(1, keepdim=True).clamp(min=1e-6)
    back = (1 - ((at[:, None] + shift_mm - centres[None]) / step_mm).abs()).clamp(min=0)
    return back @ inside


def along(volume, matrices):
    for axis, matrix in enumerate(matrices):
        volume = torch.movedim(torch.tensordot(matrix, volume, dims=([1], [axis])), 0, axis)
    return volume


def scanner(dice, clean, spacing, protocol):
    """What the scanner makes of one contrast: noise, resolution, a little motion between series, bias."""
    axis, step = protocol
    matrices = []
    for n, count in enumerate(clean.shape):
        thick = step if n == axis else 0.0
        thickness = thick * dice.uniform(0.75, 1.05)
        matrices.append(slices(dice, count, spacing, thickness, thick, dice.uniform(0.4, 1.3), dice.uniform(-0.8, 0.8)))
    level = dice.uniform(0.0, 0.10) ** 1.3
    noisy = clean + dice.white(clean.shape) * level * (1.5 if step > 3 else 1.0)
    out = along(noisy, matrices)
    bias = torch.exp(dice.uniform(0, 0.16) * dice.smooth(clean.shape, spacing, 110)[0])
    out = out * bias + dice.white(clean.shape) * level * 0.4
    return out.clamp(min=0)


def normalise(volume, mask):
    """Median 0 and mean absolute deviation 1 within the mask, clipped; 0 outside."""
    inside = volume[mask]
    if inside.numel() < 64:
        return torch.zeros_like(volume)
    middle = inside.median()
    spread = (inside - middle).abs().mean().clamp(min=1e-6)
    return ((volume - middle) / spread).clamp(-CLIP, CLIP) * mask


def sample(maps, seed, shape=(64, 80, 64), spacing=2.5, tumours=None):
    """One patient: four normalised contrasts [4, z, y, x], labels [z, y, x] and the mask they were normalised in."""
    dice = Dice(seed)
    maps = maps[list(maps)[int(dice.rng.integers(len(maps)))]]
    places = grid_of(shape, spacing)
    count = int(dice.rng.choice([0, 1, 2], p=[0.15, 0.75, 0.10])) if tumours is None else tumours
    spots, push = [], None
    for _ in range(count):
        for _ in range(20):
            # Inside the ellipsoid that a brain fills, cerebellum and stem seldom.
            where = np.array([dice.uniform(-25, 60), dice.uniform(-70, 70), dice.uniform(-58, 58)])
            if ((where - [10, 0, 0]) ** 2 / np.array([58, 78, 62]) ** 2).sum() < 0.85:
                break
        spots.append((where, place_tumour(places, dice, where)))
        one = pushed(places, where, spots[-1][1].radius_mm, dice.uniform(0, 0.45))
        push = one if push is None else push + one
    tissue = warp(maps, places, dice, dice.uniform(0.8, 4), spacing, shift_mm=6.0, push=push)
    white, grey, fluid = tissue[0], tissue[1], tissue[2]
    brain = white + grey + fluid
    labels = torch.zeros(shape, dtype=torch.long)
    means = means_of(dice)
    # What is not tissue of the map is fluid where the brain is, air elsewhere.
    images = torch.einsum("ct,tzyx->czyx", means[:, :6], tissue[:6])
    parenchyma = (white + grey)
    texture = dice.smooth(shape, spacing, 5, 1)[0]
    for _, tumour in spots:
        soft = spacing * 0.5 / tumour.radius_mm
        reluctance = dice.uniform(0.1, 0.5)
        inside_brain = torch.sigmoid((brain - 0.5) / 0.08)
        reach = tumour.oedema + reluctance * grey + dice.uniform(0.6, 2.0) * (fluid - 0.3).clamp(min=0)
        spread = dice.uniform(1.0, 4.0)
        oedema = torch.sigmoid((1 - reach) / (soft * spread)) * inside_brain * (parenchyma > 0.2)
        core_reach = tumour.core + 0.8 * (fluid - 0.6).clamp(min=0)
        core = torch.sigmoid((1 - core_reach) / soft) * inside_brain
        if tumour.kind == "low grade" and dice.chance(0.5):
            oedema = torch.minimum(oedema, core)
        parts = means[:, 6:].clone()
        jitter = 1 + 0.06 * dice.white(parts.shape)
        parts = parts * jitter
        parts[1, 0] = min(parts[1, 0], 1.05)
        if tumour.kind in ("ring", "solid"):
            thick = 0.95 if tumour.kind == "solid" else tumour.rim
            edge = core_reach + 0.25 * dice.smooth(shape, spacing, 9)[0] * tumour.rim
            centre = torch.sigmoid((1 - thick - edge) / soft)
            if tumour.kind == "solid":
                centre = torch.maximum(centre, torch.sigmoid((dice.smooth(shape, spacing, 8)[0] - dice.uniform(1.2, 2.5)) / 0.3))
            broken = torch.ones(shape)
            if dice.chance(0.4):
                broken = torch.sigmoid((dice.smooth(shape, spacing, 18)[0] + dice.uniform(0.2, 1.6)) / 0.3)
            enhancing = core * (1 - centre) * broken
            rest, column = core - enhancing, 3 if dice.chance(0.75) else 0
        else:
            enhancing = torch.zeros(shape)
            if tumour.kind == "low grade patchy":
                enhancing = core * torch.sigmoid((dice.smooth(shape, spacing, 9)[0] - dice.uniform(0.5, 1.8)) / 0.3)
            rest, column = core - enhancing, 0
        grain = 1 + dice.uniform(0.0, 0.14) * dice.smooth(shape, spacing, 7, 1)[0] + dice.uniform(0, 0.08) * texture
        oedema_only = (oedema - core).clamp(min=0)
        # Oedema is often a faint halo, and fades outwards.
        strength = dice.uniform(0.6, 1.0) * (1 - dice.uniform(0, 0.6) * reach.clamp(0, 1) ** 2)
        keep = 1 - strength * oedema_only - rest - enhancing
        lesion = (parts[:, 1, None, None, None] * (strength * oedema_only) + parts[:, column, None, None, None] * rest
                  + parts[:, 2, None, None, None] * enhancing)
        images = images * keep + lesion * grain
        labels[oedema > 0.5] = 2
        labels[(core > 0.5) & (enhancing <= 0.45)] = 1
        labels[(core > 0.5) & (enhancing > 0.45)] = 3
    healthy = labels == 0
    # Bright spots and caps of white matter that are no tumour.
    if dice.chance(0.5):
        caps = tissue[6] * white * dice.uniform(0, 0.9)
        images[2:] += caps * healthy * torch.tensor([[[[dice.uniform(0.0, 0.5)]]], [[[dice.uniform(0.1, 0.8)]]]])
    if dice.chance(0.4):
        spots_field = torch.sigmoid((dice.smooth(shape, spacing, 8)[0] - dice.uniform(2.2, 3.2)) / 0.2) * white * healthy
        images[2:] += spots_field * torch.tensor([[[[dice.uniform(0.2, 0.8)]]], [[[dice.uniform(0.3, 1.0)]]]])
    # Vessels: bright with contrast agent, in the fluid and at the surface; in FLAIR some inflow.
    vessels = tubes(dice, shape, spacing, dice.uniform(0.1, 0.28)) * (fluid + 0.15 * grey + tissue[3]).clamp(max=1)
    images[1] += vessels * dice.uniform(0.3, 2.0)
    images[3] += vessels * dice.uniform(0.0, 0.5)
    images[2] -= vessels * dice.uniform(0.0, 1.0) * images[2]
    # Flow in the ventricles and pulsation spoil the dark fluid of FLAIR in places.
    if dice.chance(0.5):
        flow = torch.sigmoid((dice.smooth(shape, spacing, 20)[0] - dice.uniform(0.8, 2.0)) / 0.3) * fluid
        images[3] += flow * dice.uniform(0.2, 1.0)
    # The tissues are not flat: the map's own detail is lost in its fractions.
    images = images * (1 + dice.uniform(0.0, 0.06) * texture) * (1 + dice.uniform(0, 0.08) * dice.smooth(shape, spacing, 30)[0])
    # A brain mask as good as extraction makes it: too wide or too narrow by some millimetres, unevenly; the dura and worse left in.
    edge = functional.avg_pool3d(brain.clamp(max=1)[None, None], 3, 1, 1)[0, 0]
    edge = functional.avg_pool3d(edge[None, None], 3, 1, 1)[0, 0]
    mask = edge + 0.12 * dice.smooth(shape, spacing, 25)[0] > dice.uniform(0.12, 0.75)
    if dice.chance(0.7):
        mask &= brain > dice.uniform(0.02, 0.4)  # the sharp ones too
    axis = int(dice.rng.choice([0, 0, 0, 0, 1, 2]))
    out = []
    for n in range(4):
        # Each series has its own slices: thin (3-D) or thick, and FLAIR and T2 mostly thick.
        thick = dice.chance(0.65)
        step = dice.uniform(2.5, 7.0) if thick else spacing
        out.append(normalise(scanner(dice, images[n], spacing, (axis, step)), mask))
    for n, chance in enumerate((0.10, 0.10, 0.08, 0.06)):
        if dice.chance(chance):
            out[n] = torch.zeros(shape)
    return torch.stack(out), labels * mask, mask


def head(maps, seed, shape=(48, 64, 48), spacing=4.0):
    """One head in one contrast, any: image [1, z, y, x] and its brain [z, y, x]. Fields of view that cut it, stripped ones, lesions."""
    dice = Dice(seed)
    maps = maps[list(maps)[int(dice.rng.integers(len(maps)))]]
    places = grid_of(shape, spacing)
    where = np.array([dice.uniform(-20, 50), dice.uniform(-60, 60), dice.uniform(-55, 55)])
    tumour = place_tumour(places, dice, where)
    sick = dice.chance(0.5)
    push = pushed(places, where, tumour.radius_mm, dice.uniform(0, 0.4)) if sick else None
    tissue = warp(maps, places, dice, dice.uniform(1, 5), spacing, turn=0.35, shift_mm=18.0, push=push)
    brain = (tissue[0] + tissue[1] + tissue[2])
    labels = brain > 0.5
    u = dice.uniform
    if dice.chance(0.8):
        row = int(dice.rng.integers(4))
        means = means_of(dice)[row]
        if dice.chance(0.3):
            means[4] *= u(0.1, 0.6)  # fat suppressed
    else:
        means = torch.tensor([u(0, 2) for _ in range(10)])
    image = torch.einsum("t,tzyx->zyx", means[:6], tissue[:6])
    # Outside the brain nothing is as plain as the map: muscle, marrow, mucosa, eyes.
    other = 1 - brain.clamp(max=1)
    image = image * (1 + other * (u(0.1, 0.5) * dice.smooth(shape, spacing, 10)[0])).clamp(min=0)
    image = image + other * (tissue[3] + tissue[5]) * (dice.smooth(shape, spacing, 12)[0] - u(0.3, 1.5)).clamp(min=0) * u(0, 1.2)
    if sick:
        lesion = torch.sigmoid((1 - tumour.oedema) / 0.06) * labels
        core = torch.sigmoid((1 - tumour.core) / 0.06) * labels
        image = image * (1 - lesion) + lesion * u(0.2, 2.4)
        image = image * (1 - core) + core * u(0.1, 2.4)
    image = image + tubes(dice, shape, spacing, u(0.1, 0.25)) * tissue[2] * u(-0.5, 2.0)
    image = image * (1 + u(0, 0.1) * dice.smooth(shape, spacing, 6)[0])
    axis = int(dice.rng.choice([0, 0, 1, 2]))
    step = u(3.5, 7.0) if dice.chance(0.5) else spacing
    image = scanner(dice, image, spacing, (axis, step))
    image = image * torch.exp(u(0, 0.3) * dice.smooth(shape, spacing, 120)[0])
    if dice.chance(0.12):
        image = image * functional.max_pool3d(labels.float()[None, None], 3, 1, 1)[0, 0]  # stripped before it came
    # The field of view: some scans begin at the orbits or end below the vertex.
    for n in range(3):
        low, high = (dice.uniform(0, 0.28 if n == 0 else 0.1) if dice.chance(0.35) else 0 for _ in range(2))
        cut = [slice(None)] * 3
        size = shape[n]
        cut[n] = slice(0, int(low * size))
        image[tuple(cut)] = 0
        labels[tuple(cut)] = False
        cut[n] = slice(size - int(high * size), size)
        image[tuple(cut)] = 0
        labels[tuple(cut)] = False
    return head_scaled(image)[None], labels.long()


def head_scaled(image):
    """An image as brain-extract sees it: 1 is the 99th percentile of what is brighter than a tenth of the mean; at most 1.5."""
    inside = image[image > 0.1 * image.mean()]
    top = torch.quantile(inside[:: max(1, inside.numel() // 50_000)], 0.99) if inside.numel() > 64 else image.new_tensor(1.0)
    return (image / top.clamp(min=1e-6)).clamp(0, 1.5)
