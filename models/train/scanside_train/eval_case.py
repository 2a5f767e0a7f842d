"""brain-mr on one patient with known labels, by the whole exam: from registered series, and from those as they were scanned.

    python -m scanside_train.eval_case CASE --scanside PATH [--models FOLDER …]

CASE holds registered/ and native/ with t1, t1c, t2 and flair.nii.gz, and registered/tumour-labels.nii.gz (1 necrosis, 2 oedema, 4 enhancing).
The labels found on the native T1c are laid over the registered one by SimpleITK, rigidly. Each --models is a folder of packages; without it those
in the binary.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .eval_brain import overlap

REGIONS = {"whole tumour": ([1, 2, 3], [1, 2, 4]), "core": ([1, 3], [1, 4]), "enhancing": ([3], [4])}


def analyze(scanside, series, out, models):
    """Label map of the T1c, the report, and CPU seconds."""
    roles = [word for role in ("t1", "t1c", "t2", "flair") for word in ("--role", f"{role}={series / role}.nii.gz")]
    packages = ["--models", str(models)] if models else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([scanside, "analyze", "--exam", "brain-mr", "--json", "--threads", "1", "--out", str(out), *roles, *packages],
                          check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return sitk.ReadImage(str(out / "tumour.nii.gz")), json.loads(done.stdout), cpu


def laid_over(fixed, moving):
    """From places of `fixed`, a brain without its head, to places of `moving`, the same patient's head."""
    start = sitk.CenteredTransformInitializer(fixed, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.GEOMETRY)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(40)
    method.SetMetricFixedMask(fixed > 0)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.2, 7)
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 300)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([4, 2, 0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(start, inPlace=True)
    method.Execute(fixed, moving)
    return start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=Path)
    parser.add_argument("--scanside", default="scanside")
    parser.add_argument("--models", type=Path, action="append")
    options = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    read = lambda path: sitk.ReadImage(str(path), sitk.sitkFloat32)
    registered, native = options.case / "registered", options.case / "native"
    labels = sitk.ReadImage(str(registered / "tumour-labels.nii.gz"))
    truth = sitk.GetArrayFromImage(labels)
    onto = laid_over(read(registered / "t1c.nii.gz"), read(native / "t1c.nii.gz"))
    print("| series | packages | " + " | ".join(f"Dice of {name}" for name in REGIONS) + " | mL (truth) | CPU s |\n|" + "---|" * 7)
    for models in options.models or [None]:
        for name, series, transform in (("registered", registered, sitk.Transform()), ("as scanned", native, onto)):
            with tempfile.TemporaryDirectory() as scratch:
                found, report, cpu = analyze(options.scanside, series, Path(scratch), models)
            found = sitk.GetArrayFromImage(sitk.Resample(found, labels, transform, sitk.sitkNearestNeighbor))
            dice = [overlap(np.isin(found, ours), np.isin(truth, theirs)) for ours, theirs in REGIONS.values()]
            volume = report["measurements"]["whole_tumour_ml"]["value"]
            print(f"| {name} | {models or 'built in'} | " + " | ".join(f"{d:.3f}" for d in dice)
                  + f" | {volume:.1f} ({(truth > 0).sum() * np.prod(labels.GetSpacing()) / 1e3:.1f}) | {cpu:.2f} |", flush=True)


if __name__ == "__main__":
    main()
