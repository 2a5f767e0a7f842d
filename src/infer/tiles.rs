//! Any segmentation package over any volume: onto the package's grid, through the network tile by tile, and back.
//!
//! Tiles overlap by the package's halo. Either each tile gives the labels of its own core alone, or overlapping tiles are
//! blended by weights that fall towards their edges; both walk the tiles in one order, so the labels do not depend on the
//! number of threads.

use ndarray::{Array3, ArrayD, ArrayViewD, IxDyn};

use super::engine::{EngineError, Network, Session};
use super::manifest::{Manifest, Scaling};
use crate::geometry::{Affine, BadGeometry, Grid, Spacing};
use crate::imaging::resample::{
    Interpolation, Reorientation, ResampleError, grid_of_spacing, resample, resample_nearest, same_grid,
};
use crate::pool::Pool;
use crate::volume::Volume;

/// Why a package cannot segment an image.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The package says something else than a label for each voxel, or less than it needs to.
    #[error("the package {name} cannot segment: {why}")]
    Package {
        /// Its name.
        name: String,
        /// Why not.
        why: String,
    },
    /// Too few or too many images.
    #[error("the package {name} takes {wanted} images ({channels}), {given} are given")]
    Channels {
        /// Its name.
        name: String,
        /// How many it takes.
        wanted: usize,
        /// What they are.
        channels: String,
        /// How many there are.
        given: usize,
    },
    /// A voxel is not a number.
    #[error("image {0} has voxels that are not numbers")]
    NotANumber(usize),
    /// The working grid.
    #[error(transparent)]
    Resample(#[from] ResampleError),
    /// The working grid's spacing.
    #[error(transparent)]
    Geometry(#[from] BadGeometry),
    /// The network.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Segments a volume of one or several channels; labels on the grid of the first.
///
/// The images are put on the package's working grid (its orientation and spacing) by linear interpolation, scaled as the
/// manifest says, run through the network tile by tile, and the labels taken back to the grid of the first image by the
/// nearest voxel. The working grid is held in memory: four bytes a voxel and channel. `progress` gets tiles done and all.
///
/// # Errors
/// [`SegmentError`].
pub fn segment(
    manifest: &Manifest,
    network: &Network,
    channels: &[&Volume],
    blend: bool,
    pool: &Pool,
    progress: &dyn Fn(usize, usize),
) -> Result<Array3<u8>, SegmentError> {
    check(manifest, network, channels.len())?;
    let first = channels[0].grid();
    let work = working_grid(manifest, &first)?;
    let images = channels.iter().enumerate().map(|(n, volume)| prepare(manifest, volume, &work, n, pool));
    let images = images.collect::<Result<Vec<_>, _>>()?;
    let labels = run(manifest, network.session()?, &images, blend, pool, progress)?;
    if same_grid(&work, &first) {
        return Ok(labels);
    }
    Ok(resample_nearest(labels.view(), &work.affine, &first, 0, pool)?)
}

/// What the network says of every voxel of images that are on its grid and scaled already: one map for each of its outputs'
/// channels, each voxel from the core of one tile.
///
/// # Errors
/// [`SegmentError`].
pub fn scores(
    manifest: &Manifest,
    network: &Network,
    session: &mut Session<'_>,
    images: &[Array3<f32>],
    pool: &Pool,
) -> Result<Vec<Array3<f32>>, SegmentError> {
    check(manifest, network, images.len())?;
    let (patch, halo) = (manifest.patch(), manifest.input.halo);
    let (z, y, x) = images[0].dim();
    let size = [z, y, x];
    let axes: [Vec<isize>; 3] = std::array::from_fn(|a| starts(size[a], patch[a], halo[a]));
    let pad = padding(manifest);
    let mut input = vec![0f32; images.len() * patch.iter().product::<usize>()];
    let mut maps: Vec<Array3<f32>> = manifest.output.labels.iter().map(|_| Array3::zeros(size)).collect();
    for sz in &axes[0] {
        for sy in &axes[1] {
            for sx in &axes[2] {
                let start = [*sz, *sy, *sx];
                cut(images, start, patch, pad, &mut input);
                let shape = IxDyn(&manifest.input.shape);
                let view = ArrayViewD::from_shape(shape, &input).expect("the tile has the size of the input");
                let outputs = session.run(pool, &[view])?;
                let tile = Scores { output: &outputs[0], patch, background: manifest.output.background() };
                let part: [_; 3] = std::array::from_fn(|a| core(start[a], size[a], patch[a], halo[a]));
                tile.each(start, part, |voxel, _, scores| {
                    maps.iter_mut().zip(scores).for_each(|(map, score)| map[voxel] = *score);
                });
            }
        }
    }
    Ok(maps)
}

fn check(manifest: &Manifest, network: &Network, given: usize) -> Result<(), SegmentError> {
    let no = |why: &str| Err(SegmentError::Package { name: manifest.name.clone(), why: why.into() });
    let [input] = network.input_shapes() else { return no("its network has more than one input") };
    if manifest.kind != super::manifest::Kind::Segmentation {
        return no("its kind is not segmentation");
    }
    if *input != manifest.input.shape || input.first() != Some(&1) {
        return no("the input of its network is not of the shape in the manifest");
    }
    let wanted = input[1];
    if wanted != given {
        let channels = manifest.input.channels.join(", ");
        return Err(SegmentError::Channels { name: manifest.name.clone(), wanted, channels, given });
    }
    if manifest.output.stride != [1; 3] {
        return no("it gives no label for every voxel (output.stride)");
    }
    let output = network.output_shapes().first().map(Vec::as_slice).unwrap_or_default();
    let labels = manifest.output.labels.len() - usize::from(manifest.output.background().is_some());
    if output.len() != input.len() || output[2..] != input[2..] || output[1] != labels {
        return no("the output of its network is not one map for each label, of the size of the input");
    }
    let patch = manifest.patch();
    if (0..3).any(|axis| patch[axis] <= 2 * manifest.input.halo[axis]) {
        return no("its halo is as large as its patch");
    }
    Ok(())
}

/// The grid the network sees: the package's orientation and spacing over the whole image.
fn working_grid(manifest: &Manifest, first: &Grid) -> Result<Grid, SegmentError> {
    let turned = Reorientation::new(first, &manifest.input.orientation)?.grid;
    let own = turned.spacing().zyx_mm();
    let wanted = manifest.input.spacing_mm;
    let spacing: [f64; 3] = std::array::from_fn(|axis| if wanted[axis] > 0.0 { wanted[axis] } else { own[axis] });
    let near = |axis: usize| (spacing[axis] / own[axis] - 1.0).abs() < 1e-3;
    // A spacing that is the image's own but for its rounding is no reason to interpolate.
    if (0..3).all(near) {
        return Ok(turned);
    }
    Ok(grid_of_spacing(&turned, Spacing::new(spacing)?)?)
}

fn prepare(manifest: &Manifest, volume: &Volume, work: &Grid, n: usize, pool: &Pool) -> Result<Array3<f32>, SegmentError> {
    let values = volume.to_f32(0..volume.shape()[0]);
    if !values.iter().all(|v| v.is_finite()) {
        return Err(SegmentError::NotANumber(n + 1));
    }
    let input = &manifest.input;
    let turned = Reorientation::new(&volume.grid(), &input.orientation)?;
    let mut image = if same_grid(&turned.grid, work) {
        turned.apply(values.view())
    } else {
        let affine: Affine = volume.affine();
        resample(values.view(), &affine, work, Interpolation::Linear, input.pad_value as f32, pool)?
    };
    scale(manifest, &mut image);
    Ok(image)
}

fn scale(manifest: &Manifest, image: &mut Array3<f32>) {
    let input = &manifest.input;
    if let Some([low, high]) = input.window {
        image.mapv_inplace(|v| v.clamp(low as f32, high as f32));
    }
    let to_range = |image: &mut [f32], low: f64, high: f64| {
        let [from, to] = input.range;
        let width = if high > low { high - low } else { 1.0 };
        for v in image {
            *v = ((f64::from(*v) - low) / width * (to - from) + from) as f32;
        }
    };
    let slice_voxels = image.dim().1 * image.dim().2;
    let Some(voxels) = image.as_slice_mut() else { return };
    match input.scaling {
        Scaling::Window => {
            if let Some([low, high]) = input.window {
                to_range(voxels, low, high);
            }
        }
        Scaling::MinMax => {
            let low = voxels.iter().copied().fold(f32::INFINITY, f32::min);
            let high = voxels.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            to_range(voxels, f64::from(low), f64::from(high));
        }
        Scaling::ZScore => z_score(voxels, 0.0),
        Scaling::RobustZScore => robust_z_score(voxels, |v| v > 0.0, input.range),
        Scaling::Brightest => brightest(voxels, input.range),
        Scaling::ZScoreSlice => voxels.chunks_mut(slice_voxels.max(1)).for_each(|slice| z_score(slice, 0.0)),
        Scaling::ZScoreSliceAll => voxels.chunks_mut(slice_voxels.max(1)).for_each(|slice| z_score(slice, f32::NEG_INFINITY)),
    }
}

/// Mean 0 and standard deviation 1 of the values above `least`; the others stay.
fn z_score(voxels: &mut [f32], least: f32) {
    let inside = || voxels.iter().filter(|v| **v > least).map(|v| f64::from(*v));
    let count = inside().count().max(1) as f64;
    let mean = inside().sum::<f64>() / count;
    let deviation = (inside().map(|v| (v - mean) * (v - mean)).sum::<f64>() / count).sqrt().max(1e-8);
    for v in voxels.iter_mut().filter(|v| **v > least) {
        *v = ((f64::from(*v) - mean) / deviation) as f32;
    }
}

/// Median 0 and mean absolute deviation 1 of the values that are `inside`, clipped to `range`; the others become 0. A median
/// stays where it is when a large lesion is there, and a mean does not.
pub fn robust_z_score(voxels: &mut [f32], inside: impl Fn(f32) -> bool, range: [f64; 2]) {
    let mut values: Vec<f32> = voxels.iter().copied().filter(|v| inside(*v)).collect();
    if values.is_empty() {
        return voxels.fill(0.0);
    }
    // The lower of two middle values.
    let at = (values.len() - 1) / 2;
    let middle = f64::from(*values.select_nth_unstable_by(at, f32::total_cmp).1);
    drop(values);
    // Summed over the image: the order that the selection left is its own business.
    let (mut sum, mut count) = (0.0, 0u64);
    for v in voxels.iter().filter(|v| inside(**v)) {
        sum += (f64::from(*v) - middle).abs();
        count += 1;
    }
    let spread = (sum / count as f64).max(1e-6);
    for v in voxels {
        *v = if inside(*v) { ((f64::from(*v) - middle) / spread).clamp(range[0], range[1]) as f32 } else { 0.0 };
    }
}

/// The 99th percentile of what is brighter than a tenth of the mean becomes 1, and everything is clipped to `range`: a head, whatever
/// the units of its contrast.
pub fn brightest(voxels: &mut [f32], range: [f64; 2]) {
    let mean = voxels.iter().map(|v| f64::from(*v)).sum::<f64>() / voxels.len().max(1) as f64;
    let mut bright: Vec<f32> = voxels.iter().copied().filter(|v| f64::from(*v) > 0.1 * mean).collect();
    let top = match bright.len() {
        0..=64 => 1.0,
        n => f64::from(*bright.select_nth_unstable_by((n - 1) * 99 / 100, f32::total_cmp).1).max(1e-6),
    };
    for v in voxels {
        *v = (f64::from(*v) / top).clamp(range[0], range[1]) as f32;
    }
}

/// First voxels of the tiles along one axis: cores of `patch - 2 * halo` side by side, all of it inside where it fits.
fn starts(voxels: usize, patch: usize, halo: usize) -> Vec<isize> {
    if voxels <= patch {
        // In the middle, as networks were trained.
        return vec![-(((patch - voxels) / 2) as isize)];
    }
    let core = patch - 2 * halo;
    let last = voxels - patch;
    let mut starts: Vec<isize> = (0..).map(|n| n * core).take_while(|start| *start < last).map(|s| s as isize).collect();
    starts.push(last as isize);
    starts
}

/// The part of a tile whose labels count: from its first or last voxel where the image ends there, else without the halo.
fn core(start: isize, voxels: usize, patch: usize, halo: usize) -> std::ops::Range<usize> {
    let end = start + patch as isize;
    let low = if start <= 0 { 0 } else { start + halo as isize };
    let high = if end >= voxels as isize { voxels as isize } else { end - halo as isize };
    low as usize..high.max(low) as usize
}

fn run(
    manifest: &Manifest,
    mut session: Session<'_>,
    images: &[Array3<f32>],
    blend: bool,
    pool: &Pool,
    progress: &dyn Fn(usize, usize),
) -> Result<Array3<u8>, SegmentError> {
    let (patch, halo) = (manifest.patch(), manifest.input.halo);
    let (z, y, x) = images[0].dim();
    let size = [z, y, x];
    let axes: [Vec<isize>; 3] = std::array::from_fn(|a| starts(size[a], patch[a], halo[a]));
    let total = axes.iter().map(Vec::len).product();
    let maps = manifest.output.labels.len();
    let background = manifest.output.background();
    let mut labels = Array3::<u8>::zeros(size);
    let mut sums = blend.then(|| vec![Array3::<f32>::zeros(size); maps]);
    let pad = padding(manifest);
    let mut input = vec![0f32; images.len() * patch.iter().product::<usize>()];
    let mut done = 0;
    for sz in &axes[0] {
        for sy in &axes[1] {
            for sx in &axes[2] {
                progress(done, total);
                done += 1;
                let start = [*sz, *sy, *sx];
                cut(images, start, patch, pad, &mut input);
                let shape = IxDyn(&manifest.input.shape);
                let view = ArrayViewD::from_shape(shape, &input).expect("the tile has the size of the input");
                let outputs = session.run(pool, &[view])?;
                let scores = Scores { output: &outputs[0], patch, background };
                match &mut sums {
                    None => {
                        let part: [_; 3] = std::array::from_fn(|a| core(start[a], size[a], patch[a], halo[a]));
                        scores.each(start, part, |voxel, best, _| labels[voxel] = best);
                    }
                    Some(sums) => {
                        let end = |a: usize| (start[a] + patch[a] as isize).min(size[a] as isize) as usize;
                        let part: [_; 3] = std::array::from_fn(|a| start[a].max(0) as usize..end(a));
                        scores.each(start, part, |voxel, _, probabilities| {
                            let weight = weight(voxel, start, patch);
                            for (sum, p) in sums.iter_mut().zip(probabilities) {
                                sum[voxel] += weight * p;
                            }
                        });
                    }
                }
            }
        }
    }
    if let Some(sums) = sums {
        for ((k, j, i), label) in labels.indexed_iter_mut() {
            *label = best(sums.iter().map(|sum| sum[[k, j, i]]));
        }
    }
    Ok(labels)
}

/// What lies outside the image, as the network sees it.
fn padding(manifest: &Manifest) -> f32 {
    let input = &manifest.input;
    match (input.scaling, input.window) {
        (Scaling::Window, Some([low, high])) => {
            let [from, to] = input.range;
            ((input.pad_value.clamp(low, high) - low) / (high - low) * (to - from) + from) as f32
        }
        (Scaling::MinMax, _) => input.range[0] as f32,
        _ => 0.0,
    }
}

/// A tile of every channel, channel by channel.
fn cut(images: &[Array3<f32>], start: [isize; 3], patch: [usize; 3], pad: f32, out: &mut [f32]) {
    let (z, y, x) = images[0].dim();
    let inside = |v: isize, n: usize| (0..n as isize).contains(&v);
    for (image, out) in images.iter().zip(out.chunks_exact_mut(patch.iter().product())) {
        let voxels = image.as_slice().expect("images are made contiguous");
        for (row, out) in out.chunks_exact_mut(patch[2]).enumerate() {
            let (k, j) = (start[0] + (row / patch[1]) as isize, start[1] + (row % patch[1]) as isize);
            out.fill(pad);
            if !inside(k, z) || !inside(j, y) {
                continue;
            }
            let line = &voxels[(k as usize * y + j as usize) * x..][..x];
            let from = start[2].max(0) as usize;
            let to = ((start[2] + patch[2] as isize).max(0) as usize).min(x);
            if from < to {
                let at = (from as isize - start[2]) as usize;
                out[at..at + to - from].copy_from_slice(&line[from..to]);
            }
        }
    }
}

/// What the network said about one tile.
struct Scores<'a> {
    output: &'a ArrayD<f32>,
    patch: [usize; 3],
    background: Option<f32>,
}

impl Scores<'_> {
    /// Every voxel of `part` with its label and the probability of each label.
    fn each(&self, start: [isize; 3], part: [std::ops::Range<usize>; 3], mut take: impl FnMut([usize; 3], u8, &[f32])) {
        let voxels: usize = self.patch.iter().product();
        let values = self.output.as_slice().expect("outputs are contiguous");
        let maps = values.len() / voxels;
        let mut probabilities = vec![0f32; maps + usize::from(self.background.is_some())];
        for k in part[0].clone() {
            for j in part[1].clone() {
                for i in part[2].clone() {
                    let at = |v: usize, axis: usize| (v as isize - start[axis]) as usize;
                    let n = (at(k, 0) * self.patch[1] + at(j, 1)) * self.patch[2] + at(i, 2);
                    let scores = (0..maps).map(|map| values[map * voxels + n]);
                    if let Some(background) = self.background {
                        // A map for each label but the background, which is what none of them claims.
                        probabilities[0] = background;
                        probabilities[1..].iter_mut().zip(scores).for_each(|(p, score)| *p = score);
                    } else {
                        probabilities.iter_mut().zip(scores).for_each(|(p, score)| *p = score);
                    }
                    take([k, j, i], best(probabilities.iter().copied()), &probabilities);
                }
            }
        }
    }
}

/// The first of the largest.
fn best(scores: impl Iterator<Item = f32>) -> u8 {
    let mut best = (0, f32::NEG_INFINITY);
    for (n, score) in scores.enumerate() {
        if score > best.1 {
            best = (n as u8, score);
        }
    }
    best.0
}

/// One in the middle of a tile, falling linearly to its edges, never zero.
fn weight(voxel: [usize; 3], start: [isize; 3], patch: [usize; 3]) -> f32 {
    (0..3).fold(1.0, |weight, axis| {
        let at = (voxel[axis] as isize - start[axis]) as f32 + 0.5;
        let half = patch[axis] as f32 / 2.0;
        weight * ((half - (at - half).abs()) / half).max(1e-3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cores_of_the_tiles_cover_every_voxel() {
        for (voxels, patch, halo) in [(10, 16, 2), (16, 16, 0), (17, 16, 2), (100, 16, 3), (33, 16, 0), (64, 16, 7)] {
            let mut covered = vec![false; voxels];
            for start in starts(voxels, patch, halo) {
                let part = core(start, voxels, patch, halo);
                assert!(part.start as isize >= start && part.end as isize <= start + patch as isize);
                covered[part].iter_mut().for_each(|c| *c = true);
            }
            assert!(covered.iter().all(|c| *c), "{voxels} voxels, patch {patch}, halo {halo}");
        }
    }

    #[test]
    fn a_tile_that_reaches_outside_is_padded_there() {
        let image = Array3::from_shape_fn((2, 2, 3), |(k, j, i)| (100 * k + 10 * j + i) as f32);
        let mut out = vec![0.0; 2 * 2 * 4];
        cut(&[image], [1, -1, -1], [2, 2, 4], -7.0, &mut out);
        assert_eq!(out[..4], [-7.0; 4]);
        assert_eq!(out[4..8], [-7.0, 100.0, 101.0, 102.0]);
        assert_eq!(out[8..], [-7.0; 8]);
    }

    #[test]
    fn z_scores_leave_the_background_alone_unless_it_counts() {
        let mut voxels = [0.0, 1.0, 3.0, -2.0];
        z_score(&mut voxels, 0.0);
        assert_eq!(voxels, [0.0, -1.0, 1.0, -2.0]);
        let mut voxels = [0.0, 4.0];
        z_score(&mut voxels, f32::NEG_INFINITY);
        assert_eq!(voxels, [-1.0, 1.0]);
    }
}
