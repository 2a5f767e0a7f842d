"""Claims about the training code that need no data: python -m unittest discover -s tests"""

import math
import tempfile
import unittest
from pathlib import Path

import nibabel
import numpy as np
import torch

from scanside_train import bmode, detect, eval_us, export, froc, lungs, nets, nodules, patches, prepare, readers, train_nodules


def volume(path, shape=(8, 9, 10), affine=None, value=1.0):
    nibabel.save(nibabel.Nifti1Image(np.full(shape, value, np.float32), np.eye(4) if affine is None else affine), path)


class BadData(unittest.TestCase):
    def test_files_that_are_no_images_are_refused_by_name(self):
        with tempfile.TemporaryDirectory() as scratch:
            bad = Path(scratch) / "bad.nii"
            bad.write_bytes(b"no image at all")
            with self.assertRaisesRegex(readers.BadData, "bad.nii"):
                readers.nifti(bad)
            with self.assertRaisesRegex(readers.BadData, "0 readable slices"):
                readers.dicom_series(scratch)

    def test_oblique_volumes_are_refused(self):
        turn = np.eye(4)
        c, s = math.cos(0.3), math.sin(0.3)
        turn[:2, :2] = [[c, -s], [s, c]]
        with tempfile.TemporaryDirectory() as scratch:
            volume(Path(scratch) / "tilted.nii", affine=turn)
            with self.assertRaisesRegex(readers.BadData, "oblique"):
                readers.nifti(Path(scratch) / "tilted.nii")


class Sides(unittest.TestCase):
    def test_every_orientation_is_read_into_the_same_patient_order(self):
        data = np.zeros((6, 5, 4), np.float32)
        data[5, 0, 3] = 7  # RAS: the patient's right is index 0, so this is left, back, head
        image = nibabel.Nifti1Image(data, np.diag([1.0, 2.0, 3.0, 1.0]))
        for code in ("RAS", "LPS", "ASR", "ILP"):
            turned = image.as_reoriented(nibabel.orientations.ornt_transform(
                nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(code)))
            with tempfile.TemporaryDirectory() as scratch:
                nibabel.save(turned, Path(scratch) / "a.nii")
                case = readers.nifti(Path(scratch) / "a.nii")
            k, j, i = np.argwhere(case.hu == 7)[0]
            # towards the head: last slice; towards the back: last row; RAS index 5 is the patient's right: first column
            self.assertEqual((k, j, i), (3, 4, 0), code)
            self.assertEqual(case.spacing, (3.0, 2.0, 1.0))

    def test_lungs_keep_their_side_and_a_tumour_inside(self):
        z, y, x = np.mgrid[:12, :200, :240] * 1.5
        hu = np.where(((x - 180) / 160) ** 2 + ((y - 150) / 120) ** 2 < 1, 30.0, -1000.0)
        for cx in (110, 250):
            hu[((x - cx) / 45) ** 2 + ((y - 150) / 70) ** 2 < 1] = -850
        hu[(x - 110) ** 2 + (y - 150) ** 2 < 100] = 20
        labels = lungs.threshold_baseline(hu, (25.0, 1.5, 1.5))
        self.assertEqual(labels[6, 100, 60], lungs.RIGHT)
        self.assertEqual(labels[6, 100, 170], lungs.LEFT)
        labels[((x - 110) ** 2 + (y - 150) ** 2 < 150)] = lungs.RIGHT  # a network knows a tumour in a lung
        refined = lungs.refine(labels, hu, (25.0, 1.5, 1.5))
        self.assertEqual(refined[6, 100, 73], lungs.RIGHT)


class Targets(unittest.TestCase):
    def test_a_target_decodes_to_the_nodule_it_was_made_from(self):
        for factor in patches.FACTORS:
            lesion = (20.3, 33.8, 41.1, 12.0 * factor)
            heat, weight, box, mask = patches.targets([lesion], [], 64, factor)
            cell = np.unravel_index(int(heat.argmax()), heat.shape)
            at = [2 * c + 0.5 + box[(n, *cell)] / patches.SPACING_MM for n, c in enumerate(cell)]
            self.assertTrue(np.allclose(at, lesion[:3], atol=1e-3))
            self.assertAlmostEqual(math.exp(box[(3, *cell)]) * factor, lesion[3], places=3)

    def test_a_mirrored_batch_is_the_batch_of_the_mirrored_patch(self):
        lesion, mirror = (20.3, 33.8, 41.1, 9.0), (20.3, 63 - 33.8, 41.1, 9.0)
        pack = lambda l: [torch.from_numpy(v)[None] for v in
                          (np.zeros((1, 64, 64, 64), np.float32), *patches.targets([l], [], 64, 1.0))]
        got = train_nodules.mirrored(pack(lesion), [1])
        for a, b in zip(got, pack(mirror)):
            self.assertTrue(torch.allclose(a, b, atol=1e-4))

    def test_an_inserted_nodule_has_its_size_and_place(self):
        grid = np.mgrid[-20:21, -20:21, -20:21] * nodules.GRID_MM
        shape = nodules.Shape(6.0 - np.sqrt((grid ** 2).sum(0)).astype(np.float32), 12.0, 5)

        class One:
            def draw(self, *_):
                return shape

        hu = np.full((40, 40, 40), -850, np.float32)
        made = nodules.insert(hu, (1.5,) * 3, (20.3, 19.6, 21.2), 10.0, One(), np.random.default_rng(1), kind="solid", noise_hu=1.0)
        inside = hu > -450
        self.assertTrue(np.allclose(np.argwhere(inside).mean(0), made.centre, atol=0.3))
        self.assertLess(abs(np.cbrt(6 * inside.sum() * 1.5 ** 3 / math.pi) / 10.0 - 1), 0.1)


class Ultrasound(unittest.TestCase):
    def test_a_seed_is_a_frame_and_its_labels_are_the_lesions_outlines(self):
        for seed in range(40):
            image, labels, scene = bmode.sample(seed)
            if not scene.lesions:
                self.assertFalse(labels.any())
                continue
            again, same, _ = bmode.sample(seed)
            self.assertTrue((image == again).all() and (labels == same).all())
            lesion = scene.lesions[0]
            area = (labels == 1).sum() * scene.mm ** 2
            self.assertLess(abs(np.sqrt(4 * area / np.pi) / lesion.diameter - 1), 0.25)
            self.assertFalse(image[~scene.inside].any())
            return

    def test_a_moved_frame_has_moved_labels(self):
        for seed in range(60):
            scene = bmode.Scene(seed)
            _, still = scene.frame()
            _, moved = scene.frame(shift=(6 * scene.mm, 0.0))
            rows, columns = np.nonzero(still == 1)
            if len(rows) and columns.max() < 200 and (moved == 1).sum() > 0.95 * len(rows):
                self.assertLess(abs(np.nonzero(moved == 1)[1].mean() - columns.mean() - 6), 0.7)
                return
        self.fail("no seed shows a lesion with room to move")

    def test_the_operating_point_counts_false_positives_by_frame(self):
        candidates = [(0.9, (0, 1)), (0.8, None), (0.7, (1, 1)), (0.6, None), (0.5, (2, 1))]
        self.assertEqual(eval_us.operating_point(candidates, 4, 10, 0.1), (0.7, 0.5))
        self.assertEqual(eval_us.operating_point(candidates, 4, 10, 0.2), (0.5, 0.75))


class Measure(unittest.TestCase):
    def test_froc_counts_a_second_hit_neither_way(self):
        truth = [(0, 0, 0, 10), (50, 0, 0, 10)]
        found = [(1, 0, 0, 9, 0.9), (2, 0, 0, 9, 0.8), (5.5, 0, 0, 9, 0.7), (50, 4, 0, 9, 0.2)]
        best, false = froc.match(truth, found)
        self.assertEqual((best, false), ([0.9, 0.2], [0.7]))
        points, cpm, found_at_all = froc.curve([(best, false)])
        self.assertEqual((points[0.125], points[1.0], found_at_all), (0.5, 1.0, 1.0))

    def test_the_curve_is_that_of_the_luna16_script(self):
        nodule = lambda *x: [(v, 0, 0, 8) for v in x]
        marks = lambda *m: [(x, 0, 0, 0, s) for x, s in m]
        scans = [froc.match(t, f) for t, f in (
            (nodule(0, 50), marks((1, 0.95), (30, 0.9), (51, 0.4), (80, 0.3), (90, 0.2))),
            (nodule(10), marks((60, 0.7), (10, 0.6), (70, 0.4))),
            (nodule(20), marks((70, 0.1))),
            ([], marks((5, 0.65), (6, 0.05))))]
        self.assertEqual(list(froc.curve(scans)[0].values()), [0.25, 0.25, 0.25, 0.75, 0.75, 0.75, 0.75])

    def test_an_excluded_finding_of_unknown_size_counts_as_10_mm(self):
        self.assertEqual(froc.match([], [(4.9, 0, 0, 0, 0.5), (5.0, 0, 0, 0, 0.4)], [(0, 0, 0, -1)]), ([], [0.4]))

    def test_an_empty_chest_is_no_training_case(self):
        hu = np.full((20, 60, 80), -1000.0, np.float32)
        hu[:, 10:50, 10:70] = 40  # a body without lungs
        _, labels, _ = prepare.label(readers.Case("empty", hu, (5.0, 4.0, 4.0)))
        self.assertEqual(int((labels > 0).sum()), 0)

    def test_the_onnx_file_says_what_pytorch_says(self):
        for spec, shape in ((nets.lung_net(), (1, 1, 32, 32)), (nets.nodule_net(), (1, 1, 16, 16, 16))):
            network = nets.Network(spec).eval()
            x = np.random.default_rng(0).random(shape, np.float32)
            with tempfile.TemporaryDirectory() as scratch:
                export.float_onnx(network, shape, Path(scratch) / "net.onnx")
                got = list(export.run(Path(scratch) / "net.onnx", [x]).values())
            with torch.no_grad():
                want = network(torch.from_numpy(x))
            for a, b in zip(got, want if isinstance(want, tuple) else (want,)):
                self.assertLess(float(np.abs(a - b.numpy()).max()), 1e-4)

    def test_tiles_cover_the_gate_once(self):
        inside = np.zeros((90, 70, 130), bool)
        inside[7:80, 5:60, 3:128] = True
        count = np.zeros(inside.shape, int)
        for origin in detect.tiles(inside):
            cut = tuple(slice(max(0, o + detect.HALO), o + detect.TILE - detect.HALO) for o in origin)
            count[cut] += 1
        self.assertTrue((count[inside] == 1).all())


if __name__ == "__main__":
    unittest.main()
