"""The training cases at hand, found in one folder; what is missing is named and skipped.

    DATA/4dlung-113/{dicom,rtstruct}   DATA/lungdx-a0001/{dicom,boxes}   DATA/lidc-0314-lungs.nii.gz
    DATA/lidc-0002-lungs.nii.gz        DATA/pyradiomics*/data/lung{1,2}_{image,label}.nrrd

Plus, wherever given: `--luna16 FOLDER`, `--lidc FOLDER`. The test case lidc-0001 is refused by name.
"""

from __future__ import annotations

from pathlib import Path

from . import readers

NEVER = ("lidc-0001", "LIDC-IDRI-0001", "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192")


def _case_4dlung(root):
    case = readers.dicom_series(root / "4dlung-113/dicom", "4dlung-113")
    case.lesions = [readers.rtstruct_lesion(next((root / "4dlung-113/rtstruct").glob("*.dcm")), case, "tumor")]
    return case


def _case_lungdx(root):
    case = readers.dicom_series(root / "lungdx-a0001/dicom", "lungdx-a0001")
    case.lesions = [readers.voc_boxes_lesion(root / "lungdx-a0001/boxes", case)]
    return case


def _case_lidc_0314(root):
    case = readers.nifti(root / "lidc-0314-lungs.nii.gz", "lidc-0314")
    case.lesions, case.cropped = [(155.4, 75.5, 83.8, 15.49)], True
    return case


def _case_lidc_0002(root):
    case = readers.nifti(root / "lidc-0002-lungs.nii.gz", "lidc-0002")
    case.lesions, case.cropped = [(173.7, 261.2, 301.2, 24.0)], True
    return case


def _case_pyradiomics(number):
    def load(root):
        image = next(iter(sorted(root.glob(f"pyradiomics*/data/lung{number}_image.nrrd"))), None)
        if image is None:
            raise readers.BadData("not there")
        case = readers.itk(image, f"pyradiomics-lung{number}")
        label = readers.itk(str(image).replace("_image", "_label"))
        if label.hu.shape != case.hu.shape:
            raise readers.BadData("label and image differ in shape")
        case.lesions = readers.mask_lesions(label)
        return case

    return load


KNOWN = {
    "4dlung-113": _case_4dlung, "lungdx-a0001": _case_lungdx, "pyradiomics-lung1": _case_pyradiomics(1),
    "pyradiomics-lung2": _case_pyradiomics(2), "lidc-0314": _case_lidc_0314, "lidc-0002": _case_lidc_0002,
}


def cases(roots, skipped, luna16=None, lidc=None):
    """Every training case that can be read, one at a time."""
    for name, load in KNOWN.items():
        last = "not there"
        for root in map(Path, roots):
            try:
                yield load(root)
                break
            except (readers.BadData, OSError, StopIteration) as error:
                last = str(error) or "not there"
        else:
            skipped.note(name, last)
    for folder, reader in ((luna16, readers.luna16), (lidc, readers.lidc)):
        if not folder:
            continue
        try:
            for case in reader(folder, skipped):
                if case.name in NEVER:
                    skipped.note(case.name, "a test case, never trained on")
                else:
                    yield case
        except (readers.BadData, OSError) as error:
            skipped.note(str(folder), str(error))
