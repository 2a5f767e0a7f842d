//! Frames of one series to the order, place and shape of their volume. The same for a stream and for files.

use serde::{Deserialize, Serialize};

use crate::dicom::Header;
use crate::geometry::{Affine, Grid, Lattice, Placed, Plane, Reason, Spacing, Verdict, lattice};
use crate::study::{Rejection, RejectionCode, Uid};
use crate::volume::{Rescale, VoxelType};

/// One frame, without its pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct FrameRecord {
    /// SOP Class UID of its instance.
    pub sop_class: Uid,
    /// SOP Instance UID of its instance.
    pub sop_instance: Uid,
    /// Which frame of it, from 0.
    pub frame: usize,
    /// Instance Number, 0 where there is none.
    pub instance_number: i64,
    /// `[rows, columns]`.
    pub size: [usize; 2],
    /// Where it is in patient space.
    pub plane: Option<Plane>,
    /// It says itself that it is a scout.
    pub localizer: bool,
    /// Slice Thickness as written.
    pub thickness_mm: Option<f64>,
    /// What the stored values are.
    pub voxel: VoxelType,
    /// From stored to real values.
    pub rescale: Rescale,
    /// A window the scanner suggests: centre, width.
    pub window: Option<[f64; 2]>,
    /// Temporal position, echo, b-value, acquisition: what tells apart images at one place.
    pub pass: [i64; 4],
    /// Distance of rows and columns for a frame without a place; None where nothing says it.
    pub flat_spacing_mm: Option<[f64; 2]>,
    /// The region of an ultrasound frame that is an image; None where the frame does not tell of regions.
    pub region: Option<[u32; 4]>,
    /// Fingerprint of its stored values ([`fingerprint`]).
    pub content: u64,
}

impl FrameRecord {
    /// Frame `n` of an instance.
    pub fn new(header: &Header, n: usize, content: u64) -> Self {
        let frame = &header.frames[n];
        // The two-dimensional region, the largest one; its scale, else what the image as a whole says.
        let area = |b: [u32; 4]| u64::from(b[2].saturating_sub(b[0])) * u64::from(b[3].saturating_sub(b[1]));
        let images = header.ultrasound_regions.iter().filter(|r| r.spatial_format <= 1);
        let image = images.max_by_key(|r| (area(r.box_pixels), r.spacing_mm.is_some()));
        // A frame of curves alone has regions, and none of them is an image.
        let region = (!header.ultrasound_regions.is_empty()).then(|| image.map_or([0; 4], |r| r.box_pixels));
        Self {
            sop_class: header.sop_class.clone(),
            sop_instance: header.sop_instance.clone(),
            frame: n,
            instance_number: header.instance_number.unwrap_or(0),
            size: [header.rows, header.columns],
            plane: frame.plane,
            localizer: frame.localizer,
            thickness_mm: frame.slice_thickness_mm,
            voxel: header.pixel.voxel_type(),
            rescale: frame.rescale,
            window: frame.window,
            pass: frame.pass,
            flat_spacing_mm: image.and_then(|r| r.spacing_mm).or(header.pixel_spacing_mm),
            region,
            content,
        }
    }
}

/// A fingerprint of pixels: equal for equal bytes, different for different ones but for one chance in 2^64.
pub fn fingerprint(bytes: &[u8]) -> u64 {
    // Four lanes of multiply and rotate keep pace with memory; a cryptographic hash would cost more than the decoding.
    const K: u64 = 0x9E37_79B9_7F4A_7C15;
    let mix = |h: u64, w: u64| (h ^ w).wrapping_mul(K).rotate_left(29);
    let word = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("chunks of 8"));
    let mut lanes = [1u64, 2, 3, 4];
    let mut blocks = bytes.chunks_exact(32);
    for block in &mut blocks {
        for (lane, b) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            *lane = mix(*lane, word(b));
        }
    }
    let tail = blocks.remainder().iter().fold(bytes.len() as u64, |h, b| mix(h, u64::from(*b)));
    let h = lanes.iter().fold(tail, |h, lane| mix(h, *lane));
    let h = (h ^ (h >> 32)).wrapping_mul(K);
    h ^ (h >> 29)
}

/// A frame that came with the series and is no part of the volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAside {
    /// SOP Instance UID.
    pub sop_instance: Uid,
    /// Which frame of it, from 0.
    pub frame: usize,
    /// Why.
    pub reason: Reason,
}

/// What the volume of a series looks like before a voxel is moved.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrangement {
    /// Shape and place.
    pub grid: Grid,
    /// For each slice k the record it is made of; None where it is missing.
    pub order: Vec<Option<usize>>,
    /// True place of each slice along the normal.
    pub along_normal_mm: Vec<f64>,
    /// What was found.
    pub verdict: Verdict,
    /// What was left out.
    pub set_aside: Vec<SetAside>,
    /// Frames have places in patient space. Without, the slices are the frames of a cine in their order, 1 mm apart by decree.
    pub placed: bool,
    /// The distance between pixels is known (always, when placed).
    pub calibrated: bool,
}

impl Arrangement {
    /// What the volume stores: the frames' own type and rescale when all agree, else real values as floats.
    pub fn voxel(&self, records: &[FrameRecord]) -> (VoxelType, Rescale) {
        let mut used = self.order.iter().flatten().map(|n| (records[*n].voxel, records[*n].rescale));
        match used.next() {
            Some(first) if used.all(|other| other == first) => first,
            _ => (VoxelType::F32, Rescale::IDENTITY),
        }
    }
}

/// Orders the frames of one series. The outcome does not depend on the order in which they come.
///
/// # Errors
/// A [`Rejection`] of [`lattice`]; `NoImages` for no frame.
pub fn arrange(records: &[FrameRecord]) -> Result<Arrangement, Rejection> {
    let mut sorted: Vec<usize> = (0..records.len()).collect();
    let key = |n: usize| (records[n].instance_number, &records[n].sop_instance, records[n].frame);
    sorted.sort_by(|a, b| key(*a).cmp(&key(*b)));
    let aside = |n: usize, reason| SetAside {
        sop_instance: records[n].sop_instance.clone(),
        frame: records[n].frame,
        reason,
    };
    let (placed, flat): (Vec<usize>, Vec<usize>) = sorted.iter().partition(|n| records[**n].plane.is_some());
    if placed.is_empty() {
        return arrange_flat(records, &flat, aside);
    }
    let frames: Vec<Placed> = placed
        .iter()
        .filter_map(|n| {
            let r = &records[*n];
            // Equal pixels under another rescale are another image.
            let scale = r.rescale.slope.to_bits().rotate_left(17) ^ r.rescale.intercept.to_bits();
            let content = r.content ^ scale;
            let (size, localizer, thickness_mm) = (r.size, r.localizer, r.thickness_mm);
            Some(Placed { plane: r.plane?, size, localizer, content, thickness_mm })
        })
        .collect();
    let Lattice { order, along_normal_mm, affine, verdict } = lattice(&frames)?;
    let order: Vec<Option<usize>> = order.into_iter().map(|slot| slot.map(|n| placed[n])).collect();
    let mut set_aside: Vec<SetAside> = verdict.set_aside.iter().map(|(n, why)| aside(placed[*n], *why)).collect();
    set_aside.extend(flat.iter().map(|n| aside(*n, Reason::NoPlace)));
    let size = order.iter().flatten().next().map_or([0, 0], |n| records[*n].size);
    let grid = Grid { shape: [order.len(), size[0], size[1]], affine };
    Ok(Arrangement { grid, order, along_normal_mm, verdict, set_aside, placed: true, calibrated: true })
}

fn arrange_flat(
    records: &[FrameRecord],
    flat: &[usize],
    aside: impl Fn(usize, Reason) -> SetAside,
) -> Result<Arrangement, Rejection> {
    let mut sizes: Vec<([usize; 2], usize)> = Vec::new();
    for n in flat {
        match sizes.iter_mut().find(|(size, _)| *size == records[*n].size) {
            Some((_, count)) => *count += 1,
            None => sizes.push((records[*n].size, 1)),
        }
    }
    let Some((size, _)) = sizes.iter().rev().max_by_key(|(_, count)| *count).copied() else {
        return Err(Rejection::new(RejectionCode::NoImages, "the series has no image"));
    };
    let (kept, others): (Vec<usize>, Vec<usize>) = flat.iter().partition(|n| records[**n].size == size);
    let spacing = records[kept[0]].flat_spacing_mm.and_then(|[y, x]| Spacing::new([1.0, y, x]).ok());
    let unit = Spacing::new([1.0; 3]).expect("a millimetre is a spacing");
    let affine = Affine::axial(spacing.unwrap_or(unit), [0.0; 3]);
    Ok(Arrangement {
        grid: Grid { shape: [kept.len(), size[0], size[1]], affine },
        along_normal_mm: (0..kept.len()).map(|k| k as f64).collect(),
        order: kept.into_iter().map(Some).collect(),
        verdict: Verdict { missing_slices: Vec::new(), set_aside: Vec::new(), tilt_degrees: 0.0, uneven: None },
        set_aside: others.into_iter().map(|n| aside(n, Reason::OtherSize)).collect(),
        placed: false,
        calibrated: spacing.is_some(),
    })
}
