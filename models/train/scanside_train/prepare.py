"""Training volumes: read every case once, label its lungs, keep both as .npz in the work folder (resumable).

    python -m scanside_train.prepare --data FOLDER [--data FOLDER ...] --work FOLDER [--luna16 F] [--lidc F]
    python -m scanside_train.prepare --evaluation DICOM --lesion K,J,I,MM --work FOLDER

The second form prepares a case to measure on, in WORK/evaluation, where no training looks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from . import lungs, readers, sources

PLANE_MM = 1.5


def label(case):
    """Lung labels on the case's own slices at 1.5 mm in plane -> (hu, labels, spacing)."""
    hu = lungs.resample_plane(case.hu, case.spacing, PLANE_MM)
    spacing = (case.spacing[0], PLANE_MM, PLANE_MM)
    centre = [(n - 1) / 2 for n in case.hu.shape]
    middle = [(n - 1) / 2 for n in hu.shape]
    lesions = [
        (k, (j - centre[1]) * case.spacing[1] / PLANE_MM + middle[1], (i - centre[2]) * case.spacing[2] / PLANE_MM + middle[2], d)
        for k, j, i, d in case.lesions
    ]
    labels = lungs.classical(hu, spacing, case.cropped, lesions=lesions)
    return hu, labels, spacing


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", default=[], type=Path)
    parser.add_argument("--evaluation", type=Path, help="a DICOM folder to measure on, named by the folder above it")
    parser.add_argument("--lesion", action="append", default=[], help="k,j,i,diameter of a known lesion in it")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--luna16", type=Path)
    parser.add_argument("--lidc", type=Path)
    options = parser.parse_args()
    skipped, used = readers.Skipped(), 0
    folder = options.work / ("evaluation" if options.evaluation else "prepared")
    folder.mkdir(parents=True, exist_ok=True)
    if options.evaluation:
        case = readers.dicom_series(options.evaluation, options.evaluation.resolve().parent.name)
        case.lesions = [tuple(float(v) for v in l.split(",")) for l in options.lesion]
        found = [case]
    else:
        found = sources.cases(options.data, skipped, options.luna16, options.lidc)
    for case in found:
        out = folder / f"{case.name}.npz"
        if not out.exists():
            plane, labels, plane_spacing = label(case)
            right, left = (int((labels == side).sum()) * np.prod(plane_spacing) / 1000 for side in (1, 2))
            print(f"{case.name}: {case.hu.shape} right {right:.0f} ml left {left:.0f} ml, lesions {case.lesions}", flush=True)
            if min(right, left) < 200:
                skipped.note(case.name, f"no two lungs found ({right:.0f} and {left:.0f} ml)")
                continue
            np.savez(out, hu=np.round(case.hu).astype(np.int16), spacing=case.spacing, origin=case.origin,
                     lesions=np.array(case.lesions, float).reshape(-1, 4), cropped=case.cropped,
                     plane=np.round(plane).astype(np.int16), labels=labels, plane_spacing=plane_spacing)
        used += 1
    skipped.close(used)


if __name__ == "__main__":
    main()
