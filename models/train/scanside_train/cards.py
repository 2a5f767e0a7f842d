"""The cards: what a model was made from, what it can and cannot do. Figures come from a results file, never from here."""

from . import nets

ATTRIBUTION = """## Data and attribution

Images: 4D-Lung, patient 113_HM10395 (Hugo et al., CC BY 3.0, doi 10.7937/K9/TCIA.2016.ELN8YGLE); Lung-PET-CT-Dx, A0001
(Li et al., CC BY 4.0, doi 10.7937/TCIA.2020.NNC2-0461); LIDC-IDRI-0314 and LIDC-IDRI-0002 (Armato et al., CC BY 3.0, doi
10.7937/K9/TCIA.2015.LO9QL9SX); two lung CT distributed with pyradiomics 3.0.1 (BSD-3-Clause). LIDC-IDRI-0001 is the test
case: neither network nor any threshold has seen it. No image is part of this package; the golden pair is a drawing.
"""

NOT_A_DEVICE = """## What it is not

No medical device. Made from six patients; not validated for diagnosis; not to be used to decide about a patient.
"""


def _results(path):
    return path.read_text() if path else "Not yet measured for this version.\n"


def lung_seg(results):
    return f"""# lung-seg

Right and left lung in chest CT, slice by slice at 3 mm, for cropping, gating and lung volume.

- Input `[1, 1, 160, 160]`: one axial slice, columns to the patient's left, rows to the back, 3 mm, centre of the image in
  the centre, -1000 HU outside; HU -1000..400 to 0..1.
- Output `[1, 3, 160, 160]`: logits of background, right lung, left lung. Sides are the patient's, by place in the image:
  trained with mirrored slices and exchanged labels, so a mirrored heart does not exchange the lungs.
- A 2-D U-Net of four poolings, 0.144 GMAC a slice, int8 (QDQ, opset 13).

## The reference way to use it

`scanside_train/lungs.py`: `network_planes`, `to_full_grid`, `refine`; the figures below are of these. The box's exam resamples alike
and has its own refinement from the network's probabilities.

1. Slices: every `max(1, floor(2.5 / dz + 0.5))`-th from slice 0, and the last.
2. In plane: a box mean of `max(1, floor(3 / spacing + 0.5))` pixels each way (edge pixels repeated; an even box reaches one
   further to lower indices), then linear sampling at 3 mm, centre on centre; outside the image -1000 HU.
3. The arg max; back to the image's grid by nearest neighbour in plane and along slices (of two equally near, the lower).
4. Each side, right first: keep the largest 6-connected piece and all of at least 5 % of it. `core` = eroded in plane by a
   disc of 4.5 mm, `wide` = dilated in plane by a disc of 3 mm less the other side's network mask. The lung is `core` and
   the voxels of `wide` below -500 HU; closed in plane by a disc of 6 mm, holes of each slice filled, cut back to `wide`.

## Labels

Nobody drew them. Training masks were made by thresholds, airway tracking, splitting and closing, known tumours filled in
within the convex hull, and looked at. Augmentation: turning, scaling, shifting, mirroring, density, noise, blur, cut fields
of view, soft-tissue blobs inside the lungs (so that tumours and consolidation stay inside the mask). The two cropped cases
were put back into a drawn body.

## Measured

{_results(results)}
## Limits

Six adult patients, lying on their back. Not trained on: children, one lung removed, large effusions (an effusion is not lung
here), gantry tilt, images whose lungs leave the 480 mm field. The trachea and main bronchi are not lung.

{ATTRIBUTION}
{NOT_A_DEVICE}"""


def nodule_detect(results):
    return f"""# nodule-detect

Candidates for lung nodules and masses in chest CT, in 3-D, on a pyramid of two grids.

- Input `[1, 1, 64, 64, 64]` (any multiple of 4 works): cubes of 1.5 mm, or of 3 mm for the coarse level; axes to the head, the
  back, the patient's left; HU -1000..400 to 0..1; -1000 HU outside.
- Output at stride 2, cell c at voxel 2 c + 0.5: `heatmap` `[1, 1, 32, 32, 32]`, logit of a centre here; `box`
  `[1, 4, 32, 32, 32]`: (dz, dy, dx) from the cell's centre to the nodule's in mm, and ln(diameter in mm). The network knows
  no spacing: at pyramid factor f multiply offsets and diameter by f.
- The fine level answers for 3 to 32 mm, the coarse one for 8 to 90 mm (its finds below 10 mm are dropped).
- int8 (QDQ, opset 13), 1.02 GMAC a tile of 64, 3.9 kMAC a voxel.

## The reference way to use it

`scanside_train/detect.py`; the figures below are of it. Resample by a box mean of `max(1, floor(target / spacing + 0.5))` voxels along each axis
and linear sampling, centre on centre. Tiles with a halo of 4 whose inner 56 cover the bounding box of the gate; tiles whose
inner part holds no gate voxel are skipped. A candidate is a cell of the inner part no lower than its 26 neighbours and above
`candidate_logit_min`, whose decoded centre lies in the gate. Then over both levels: strongest first, a candidate within half the
larger diameter of a stronger one goes. The gate is each lung closed by its per-slice convex hull (where that is at most 1.6
times the lung's area), grown by 4 mm.

## Training

Real lungs, inserted nodules: outlines of 1,280 LIDC-IDRI nodules by one of their readers, as shapes at 3 to 30 mm (to 70 mm on the
coarse grid), turned and mirrored; solid, part-solid, ground glass and calcified densities by the readers' texture rating;
blurred by a scanner's point spread and slice, with the noise of their surroundings; free, at the pleura, at vessels. Real
annotated lesions of the training cases are nodules too. Everything else in those lungs is not. Slices of 2 to 5 mm, sharp and soft
kernels, noise, calibration and inspiration are imitated.

## Measured

{_results(results)}
## Limits

Six adult patients make the background, so vessels and scars of other lungs may be taken for nodules: use the second stage
(`nodule-class`). Inserted nodules are not found ones: figures on them flatter. Below 4 mm nothing is promised.

{ATTRIBUTION}
{NOT_A_DEVICE}"""


def nodule_class(results, candidates, nodules, features):
    return f"""# nodule-class

A random forest that says how likely a candidate of `nodule-detect` is a nodule, from {len(features)} named features that the exam
measures at full resolution (schema `scanside.forest/1`, evaluated in Rust; the same numbers as scikit-learn). It does not see the
detector's score. The exam adds the two opinions as log odds: confidence = 1 / (1 + e^-s), s = `heat_weight` * max(logit, `heat_min`) +
`forest_weight` * ln((p + 0.01) / (1.01 - p)) + `offset`, weighed and calibrated on patients left out of the forest in turn.

Features: {", ".join(features)}.

Trained on {candidates} candidates, {nodules} of them nodules (inserted ones and the annotated lesions), in synthetic scans made from the
training cases of nodule-detect: `scanside model features` computes what it learns from, so it sees what the box sees.

## Measured

{_results(results)}
## Limits

Its nodules are mostly inserted ones in six patients' lungs, and its other candidates come from lungs the detector was trained on, where
the detector errs less than elsewhere. It says nothing about malignancy.

{ATTRIBUTION}
{NOT_A_DEVICE}"""


def us_lesion(results):
    return f"""# us-lesion

Focal lesions (nodules) in B-mode ultrasound, frame by frame. **Trained on simulation only: no frame of a patient was seen.**

- Input `[1, 1, 256, 256]`: one frame, grey 0..255 to 0..1, square pixels, the field (what the transducer draws) in the middle
  with its longer side over 70 to 100 % of the frame, 0 outside the field; writing and marks taken out.
- Output `[1, 1, 256, 256]`: logit of a lesion at each pixel.
- A 2-D U-Net of five poolings, {nets.macs(nets.us_net(), (256, 256)) / 1e9:.2f} GMAC a frame, int8 (QDQ, opset 13). It knows no millimetres.

## The reference way to use it

Pixels above 0 (probability 0.5), closed by a disc of 3 pixels, that touch by an edge are a candidate; its confidence is the mean
probability over those above 0. Those of at
least `pixels_min` pixels and `candidate_min` are lesions of the frame; `confidence_min` and `frames_min` hold for the mean and the number
of its frames in a cine. `scanside_train/eval_us.py` measures it; the box's exam does the same and follows each lesion.

## Training

`scanside_train/bmode.py`: complex Gaussian scatterers in layered tissue with fascia, muscle, vessels, bone, gas, poor contact; a pulse
whose lateral width depends on depth and focus; attenuation, time gain, reverberation, clutter, noise, compounding, log compression; linear, convex
and phased fields of 25 to 150 mm depth. Lesions of 3 to 40 mm: darker (6 to 20 dB), brighter (6 to 12 dB) or of equal
brightness with a dark rim; round to lobulated; with enhancement, shadow or neither below. Vessels, shadows and fascia are not
lesions. Outlines are exact, since they are drawn. To learn from, brighter ones and rims are drawn more often (0.30 and 0.28 of all lesions)
than to measure on (0.20 and 0.18). The loss is cross-entropy and soft Dice, of the batch and of each lesion where it is the nearest
(after Kofler et al. 2022); the weights kept are a running mean.

## Measured

{_results(results)}
## Limits

Simulated tissue is simpler than tissue: figures on it flatter. What real lesions of a real organ need (data, an expert's outlines) is not
here; a site that wants to use this must measure it on its own images first. Cysts without any echo, calcification alone, colour
flow over the image and frozen images with callipers drawn in were not trained on.

## What it is not

No medical device. Made from no patient; not validated for diagnosis; not to be used to decide about a patient.
"""


BRAIN_ATTRIBUTION = """## Data and attribution

No image of a patient. The tissue maps come from ICBM 152 2009a (in nilearn's wheel; Fonov et al. 2009, 2011) and Colin 27 (in Debian's
mricron-data; Holmes et al. 1998): Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
McGill University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and without fee is
hereby granted, provided that the above copyright notice appear in all copies. TCGA-FG-6692 is a test case: neither network nor any
threshold has seen it.
"""

BRAIN_NOT_A_DEVICE = """## What it is not

No medical device. Made from two healthy templates and drawn lesions; not validated for diagnosis; not to be used to decide about a patient.
"""

BRAIN = {
    "brain-extract": """# brain-extract

The brain in an MR image of a head, whatever its contrast: for stripping the skull before a tumour is sought.

- Input `[1, 1, 48, 64, 48]`: one image along the axes of patient space (columns to the left, rows to the back, slices to the head), 4 mm,
  the highest slice of the head 6 mm below the top of the box, what is bright in its upper part in the middle; 0 outside. Scaled so that
  the 99th percentile of what is brighter than a tenth of the mean is 1; clipped to 0..1.5.
- Output: logits of background and brain (grey and white matter, ventricles, and the fluid between).
- The exam adds the logits of all contrasts, interpolates them linearly, and keeps the largest piece above zero, its holes filled.
""",
    "brain-tumour": """# brain-tumour

Glioma-like tumours in brain MR: necrotic or non-enhancing core (1), oedema (2), enhancing part (3).

- Input `[1, 4, 64, 80, 64]`: T1, T1 with contrast agent, T2, FLAIR on one grid of 2.5 mm along the axes of patient space, without the head;
  each channel evened out (a quadratic in the logarithms), its median in the brain 0, its mean absolute deviation 1, clipped to -6..6, 0
  outside the brain. A contrast that is not there is 0 everywhere; the exam wants three of the four, T2 or FLAIR among them.
- Output: logits of the four labels. The exam looks at the images both ways round, averages the probabilities, interpolates them to 1 mm, and
  calls tumour what is tumour with more than `whole_min`; pieces below `lesion_ml_min` or nowhere surer than `peak_min` are left out.
""",
}


def brain(name, results):
    return f"""{BRAIN[name]}- A 3-D network of dense blocks (Huang et al. 2017) at a half, a quarter and an eighth of the resolution, 8 to 64 channels, int8 (QDQ,
  opset 13), concatenation without copies.

## Training

`scanside_train/brain_synth.py`, the idea of SynthSeg (Billot et al. 2023): tissue maps of two templates, turned, scaled, mirrored and bent; every
tissue a random intensity within what a contrast allows (fluid dark on T1 and FLAIR, bright on T2; oedema bright on T2 and FLAIR; rims enhance on
T1c only); tumours with necrosis, rim and oedema grown into them, pushing the brain aside; vessels, white matter lesions, bright spots and flow as
what must not be taken for one; thick slices, motion between series, bias, noise, imperfect masks. Cross-entropy and soft Dice, of the whole and
the core as well as of each label. First at twice the spacing, then at the network's own.

## Measured

{_results(results)}
## Limits

Two adult templates, bent. Children, large resections, haemorrhage, other lesions (abscess, infarct, demyelination) were not drawn and will be
taken for tumour or for nothing. The network looks at 2.5 mm or coarser: thin rims and small lesions are lost or rounded.

{BRAIN_ATTRIBUTION}
{BRAIN_NOT_A_DEVICE}"""
