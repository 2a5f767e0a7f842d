//! Connected components of a mask: labels, sizes, boxes, centroids. And the holes they enclose.
//!
//! Works on runs of voxels along the rows (He, Chao & Suzuki 2008): memory and time follow the mask's outline, not its
//! volume. Labels count from 1 in the order of each component's first voxel, as `scipy.ndimage.label` numbers them.

use ndarray::{Array3, ArrayView3};

use crate::pool::{Fault, Pool};

/// Which voxels touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connectivity {
    /// Those that share a face: 6 neighbours, 4 in one slice.
    Faces,
    /// Those that share a face or an edge: 18 neighbours, 8 in one slice.
    Edges,
    /// Those that share a face, an edge or a corner: 26 neighbours.
    Corners,
    /// Those that share an edge within their slice: 4 neighbours; every slice stands alone.
    SliceEdges,
    /// Those that share an edge or a corner within their slice: 8 neighbours; every slice stands alone.
    SliceCorners,
}

impl Connectivity {
    /// By the number of neighbours: 4, 6, 8, 18 or 26.
    pub fn from_neighbours(count: u32) -> Option<Self> {
        Some(match count {
            4 => Self::SliceEdges,
            6 => Self::Faces,
            8 => Self::SliceCorners,
            18 => Self::Edges,
            26 => Self::Corners,
            _ => return None,
        })
    }

    /// Rows before a row that may touch it, as `(slices back, rows back)`, and how far columns may be apart.
    fn earlier_rows(self) -> &'static [(usize, isize, u32)] {
        match self {
            Self::Faces => &[(0, 1, 0), (1, 0, 0)],
            Self::Edges => &[(0, 1, 1), (1, -1, 0), (1, 0, 1), (1, 1, 0)],
            Self::Corners => &[(0, 1, 1), (1, -1, 1), (1, 0, 1), (1, 1, 1)],
            Self::SliceEdges => &[(0, 1, 0)],
            Self::SliceCorners => &[(0, 1, 1)],
        }
    }
}

/// One component.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Component {
    /// Its number in the label map, from 1.
    pub label: u32,
    /// Its size.
    pub voxels: u64,
    /// The lowest slice, row and column it reaches.
    pub first: [usize; 3],
    /// The highest slice, row and column it reaches (within it).
    pub last: [usize; 3],
    /// The mean of its voxels' indices, `[k, j, i]`.
    pub centroid_voxel: [f64; 3],
}

/// A stretch of voxels of one row, `start..end`.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: u32,
    end: u32,
    /// While joining: the first run of its set that is known; then the label.
    label: u32,
}

/// A mask's components, kept as runs until they are painted.
#[derive(Debug, Clone)]
pub struct Components {
    shape: [usize; 3],
    runs: Vec<Run>,
    /// Runs of row `n` are `rows[n]..rows[n + 1]`.
    rows: Vec<usize>,
    list: Vec<Component>,
}

/// More rows or runs than labels can count.
#[derive(Debug, thiserror::Error)]
pub enum ComponentError {
    /// A mask so broken up that its parts cannot be numbered in 32 bits.
    #[error("the mask falls into more than 4 billion runs")]
    TooManyRuns,
    /// A task panicked.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Finds the components of all voxels that are not 0.
///
/// # Errors
/// [`ComponentError`].
pub fn label(mask: ArrayView3<u8>, connectivity: Connectivity, pool: &Pool) -> Result<Components, ComponentError> {
    components(mask, true, connectivity, pool)
}

/// Components of the voxels that are not 0 (`inside`), or of those that are.
fn components(
    mask: ArrayView3<u8>,
    inside: bool,
    connectivity: Connectivity,
    pool: &Pool,
) -> Result<Components, ComponentError> {
    let (slices, height, width) = mask.dim();
    if mask.is_empty() {
        return Ok(Components {
            shape: [slices, height, width],
            runs: vec![],
            rows: vec![0; slices * height + 1],
            list: vec![],
        });
    }
    let mask = mask.as_standard_layout();
    let voxels = mask.as_slice().expect("standard layout");
    let per_slice = pool.map(slices, |k| {
        let mut runs = Vec::new();
        let mut counts = Vec::with_capacity(height);
        for row in voxels[k * height * width..(k + 1) * height * width].chunks_exact(width) {
            let before = runs.len();
            find_runs(row, inside, &mut runs);
            counts.push(runs.len() - before);
        }
        (runs, counts)
    })?;
    let total: usize = per_slice.iter().map(|(runs, _)| runs.len()).sum();
    if u32::try_from(total).is_err() {
        return Err(ComponentError::TooManyRuns);
    }
    let mut runs = Vec::with_capacity(total);
    let mut rows = Vec::with_capacity(slices * height + 1);
    rows.push(0);
    for (slice_runs, counts) in per_slice {
        runs.extend(slice_runs);
        rows.extend(counts.iter().scan(*rows.last().expect("starts with 0"), |end, n| {
            *end += n;
            Some(*end)
        }));
    }
    runs.iter_mut().zip(0..).for_each(|(run, n)| run.label = n);
    join(&mut runs, &rows, [slices, height], connectivity);
    let list = number(&mut runs, &rows, height);
    Ok(Components { shape: [slices, height, width], runs, rows, list })
}

/// Eight voxels at once: whether none of them, or all of them, are 0 decides most of an image.
fn find_runs(row: &[u8], inside: bool, runs: &mut Vec<Run>) {
    let mut at = 0;
    loop {
        at = next(row, at, inside);
        if at == row.len() {
            return;
        }
        let end = next(row, at, !inside);
        runs.push(Run { start: at as u32, end: end as u32, label: 0 });
        at = end;
    }
}

/// The first column from `at` whose voxel is not 0 (`wanted`) or is 0, or the row's length.
fn next(row: &[u8], mut at: usize, wanted: bool) -> usize {
    const LOW: u64 = 0x0101_0101_0101_0101;
    while let Some(eight) = row.get(at..at + 8) {
        let word = u64::from_le_bytes(eight.try_into().expect("eight bytes"));
        let hit = if wanted { word != 0 } else { word.wrapping_sub(LOW) & !word & (LOW << 7) != 0 };
        if hit {
            break;
        }
        at += 8;
    }
    row[at.min(row.len())..].iter().position(|v| (*v != 0) == wanted).map_or(row.len(), |n| at + n)
}

fn root(runs: &mut [Run], mut n: u32) -> u32 {
    while runs[n as usize].label != n {
        let parent = runs[n as usize].label;
        runs[n as usize].label = runs[parent as usize].label;
        n = parent;
    }
    n
}

/// Joins runs that touch; the root of a set is its first run.
fn join(runs: &mut [Run], rows: &[usize], [slices, height]: [usize; 2], connectivity: Connectivity) {
    for k in 0..slices {
        for j in 0..height {
            for (back, up, reach) in connectivity.earlier_rows() {
                let Some(other) = j.checked_add_signed(-up).filter(|r| *r < height) else { continue };
                let Some(slice) = k.checked_sub(*back) else { continue };
                let (here, there) = (k * height + j, slice * height + other);
                let (mut a, mut b) = (rows[here], rows[there]);
                while a < rows[here + 1] && b < rows[there + 1] {
                    let (x, y) = (runs[a], runs[b]);
                    if x.start < y.end + reach && y.start < x.end + reach {
                        let (p, q) = (root(runs, a as u32), root(runs, b as u32));
                        runs[p.max(q) as usize].label = p.min(q);
                    }
                    if x.end < y.end { a += 1 } else { b += 1 }
                }
            }
        }
    }
}

/// Gives every run its component's number and measures the components.
fn number(runs: &mut [Run], rows: &[usize], height: usize) -> Vec<Component> {
    let mut list: Vec<Component> = Vec::new();
    let mut sums: Vec<[u128; 3]> = Vec::new();
    for row in 0..rows.len() - 1 {
        let (k, j) = (row / height, row % height);
        for n in rows[row]..rows[row + 1] {
            // A set's first run comes before the others, so theirs already point at runs that carry the number.
            let parent = runs[n].label as usize;
            let label = if parent == n {
                list.push(Component {
                    label: list.len() as u32 + 1,
                    voxels: 0,
                    first: [k, j, runs[n].start as usize],
                    last: [k, j, 0],
                    centroid_voxel: [0.0; 3],
                });
                sums.push([0; 3]);
                list.len() as u32
            } else {
                runs[parent].label
            };
            runs[n].label = label;
            let (start, end) = (runs[n].start as usize, runs[n].end as usize);
            let count = (end - start) as u128;
            let component = &mut list[label as usize - 1];
            component.voxels += count as u64;
            for (axis, (low, high)) in [(k, k), (j, j), (start, end - 1)].into_iter().enumerate() {
                component.first[axis] = component.first[axis].min(low);
                component.last[axis] = component.last[axis].max(high);
                sums[label as usize - 1][axis] += (low + high) as u128 * count;
            }
        }
    }
    for (component, sum) in list.iter_mut().zip(sums) {
        component.centroid_voxel = sum.map(|s| s as f64 / 2.0 / component.voxels as f64);
    }
    list
}

impl Components {
    /// The components, by label.
    pub fn list(&self) -> &[Component] {
        &self.list
    }

    /// Numbered anew by size, the largest first; equal ones keep their order.
    pub fn by_size(self) -> Self {
        let mut order = self.list.clone();
        order.sort_by_key(|c| std::cmp::Reverse(c.voxels));
        self.renumbered(&order)
    }

    /// Only those that `keep` wants, numbered anew in their order.
    pub fn retain(self, keep: impl Fn(&Component) -> bool) -> Self {
        let kept: Vec<Component> = self.list.iter().filter(|c| keep(c)).copied().collect();
        self.renumbered(&kept)
    }

    fn renumbered(mut self, order: &[Component]) -> Self {
        let mut new = vec![0; self.list.len() + 1];
        for (n, c) in (1..).zip(order) {
            new[c.label as usize] = n;
        }
        self.runs.iter_mut().for_each(|run| run.label = new[run.label as usize]);
        self.list = order.iter().zip(1..).map(|(c, label)| Component { label, ..*c }).collect();
        self
    }

    /// The label map: each component's number, 0 elsewhere.
    ///
    /// # Errors
    /// A task's panic.
    pub fn paint(&self, pool: &Pool) -> Result<Array3<u32>, Fault> {
        let mut labels = Array3::zeros(self.shape);
        let [_, height, width] = self.shape;
        let voxels = labels.as_slice_mut().expect("made here");
        pool.for_each_chunk(voxels, height * width, |k, slice| self.paint_slice(k, slice, |label| label))?;
        Ok(labels)
    }

    /// Slice `k` of the label map, into zeros; `stored` makes a label a voxel.
    pub fn paint_slice<T: Copy>(&self, k: usize, slice: &mut [T], stored: impl Fn(u32) -> T) {
        let [_, height, width] = self.shape;
        for (j, row) in slice.chunks_exact_mut(width.max(1)).enumerate() {
            let n = k * height + j;
            for run in self.runs[self.rows[n]..self.rows[n + 1]].iter().filter(|run| run.label > 0) {
                row[run.start as usize..run.end as usize].fill(stored(run.label));
            }
        }
    }

    fn paint_onto<T: Copy + Send + Sync>(
        &self,
        onto: &mut Array3<T>,
        value: impl Fn(u32) -> Option<T> + Sync,
        pool: &Pool,
    ) -> Result<(), Fault> {
        let [_, height, width] = self.shape;
        let voxels = onto.as_slice_mut().expect("made contiguous");
        pool.for_each_chunk(voxels, height * width, |k, slice| {
            for (j, row) in slice.chunks_exact_mut(width).enumerate() {
                let n = k * height + j;
                for run in &self.runs[self.rows[n]..self.rows[n + 1]] {
                    if let Some(value) = value(run.label) {
                        row[run.start as usize..run.end as usize].fill(value);
                    }
                }
            }
        })
    }
}

/// Fills what the mask encloses: background that no path of faces joins to the image's border (`per_slice`: within its
/// slice). One slice alone is two-dimensional. The result is 0 and 1.
///
/// # Errors
/// [`ComponentError`].
pub fn fill_holes(mask: ArrayView3<u8>, per_slice: bool, pool: &Pool) -> Result<Array3<u8>, ComponentError> {
    let (slices, height, width) = mask.dim();
    let flat = per_slice || slices == 1;
    let connectivity = if flat { Connectivity::SliceEdges } else { Connectivity::Faces };
    let background = components(mask, false, connectivity, pool)?;
    let open: Vec<bool> = background
        .list
        .iter()
        .map(|c| {
            let last = [slices, height, width];
            (usize::from(flat)..3).any(|axis| c.first[axis] == 0 || c.last[axis] + 1 == last[axis])
        })
        .collect();
    let mut filled = mask.mapv(|v| u8::from(v != 0)).as_standard_layout().into_owned();
    background.paint_onto(&mut filled, |label| (!open[label as usize - 1]).then_some(1), pool)?;
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// About half of the voxels, scattered; the same in the Python that made the golden numbers.
    fn scattered(shape: [usize; 3], modulus: usize) -> Array3<u8> {
        Array3::from_shape_fn(shape, |(k, j, i)| {
            u8::from((k * k * 31 + j * j * 17 + i * i * 7 + i * j + k * i) % 11 < modulus)
        })
    }

    /// The definition: flood from voxel to voxel.
    fn flooded(mask: &Array3<u8>, connectivity: Connectivity) -> Array3<u32> {
        let (z, y, x) = mask.dim();
        let mut labels = Array3::zeros((z, y, x));
        let touches = |d: [isize; 3]| {
            let apart = d.iter().filter(|v| **v != 0).count();
            match connectivity {
                Connectivity::Faces => apart == 1,
                Connectivity::Edges => apart == 1 || apart == 2,
                Connectivity::Corners => apart > 0,
                Connectivity::SliceEdges => apart == 1 && d[0] == 0,
                Connectivity::SliceCorners => apart > 0 && d[0] == 0,
            }
        };
        let mut count = 0;
        for (start, v) in mask.indexed_iter() {
            if *v == 0 || labels[start] != 0 {
                continue;
            }
            count += 1;
            labels[start] = count;
            let mut stack = vec![start];
            while let Some((k, j, i)) = stack.pop() {
                for n in 0..27isize {
                    let d = [n / 9 - 1, n / 3 % 3 - 1, n % 3 - 1];
                    let to = (k.wrapping_add_signed(d[0]), j.wrapping_add_signed(d[1]), i.wrapping_add_signed(d[2]));
                    if touches(d) && mask.get(to).is_some_and(|v| *v != 0) && labels[to] == 0 {
                        labels[to] = count;
                        stack.push(to);
                    }
                }
            }
        }
        labels
    }

    #[test]
    fn labels_are_those_of_a_flood_in_scan_order_for_every_connectivity() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            for count in [4, 6, 8, 18, 26] {
                let connectivity = Connectivity::from_neighbours(count).unwrap();
                for modulus in [1, 2, 4, 6] {
                    let mask = scattered([7, 12, 37], modulus);
                    let found = label(mask.view(), connectivity, &pool).unwrap();
                    let labels = found.paint(&pool).unwrap();
                    assert_eq!(labels, flooded(&mask, connectivity), "{connectivity:?} {modulus}");
                    for c in found.list() {
                        let voxels: Vec<_> =
                            labels.indexed_iter().filter(|(_, l)| **l == c.label).map(|(v, _)| v).collect();
                        assert_eq!(c.voxels as usize, voxels.len());
                        let mean = voxels.iter().map(|v| v.2 as f64).sum::<f64>() / voxels.len() as f64;
                        assert!((c.centroid_voxel[2] - mean).abs() < 1e-9);
                        assert_eq!(c.first[1], voxels.iter().map(|v| v.1).min().unwrap());
                        assert_eq!(c.last[2], voxels.iter().map(|v| v.2).max().unwrap());
                    }
                }
            }
        }
    }

    #[test]
    fn the_largest_comes_first_when_asked_and_small_ones_can_go() {
        let pool = Pool::new(1);
        let mut mask = Array3::zeros((1, 4, 9));
        mask[[0, 0, 0]] = 1u8;
        mask.slice_mut(ndarray::s![0, 2.., 3..8]).fill(7);
        let found = label(mask.view(), Connectivity::Faces, &pool).unwrap().by_size();
        assert_eq!(found.list().iter().map(|c| c.voxels).collect::<Vec<_>>(), [10, 1]);
        assert_eq!(found.list()[0].centroid_voxel, [0.0, 2.5, 5.0]);
        let large = found.retain(|c| c.voxels > 5);
        let labels = large.paint(&pool).unwrap();
        assert_eq!((labels[[0, 0, 0]], labels[[0, 3, 7]]), (0, 1));
    }

    #[test]
    fn holes_are_filled_and_bays_are_not() {
        let pool = Pool::new(2);
        let mut mask = Array3::from_elem((5, 6, 7), 1u8);
        mask[[2, 2, 2]] = 0;
        mask[[2, 0, 3]] = 0;
        mask.slice_mut(ndarray::s![.., 4, 5]).fill(0);
        let filled = fill_holes(mask.view(), false, &pool).unwrap();
        assert_eq!((filled[[2, 2, 2]], filled[[2, 0, 3]], filled[[2, 4, 5]]), (1, 0, 0));
        // A tube is a hole of every slice.
        let filled = fill_holes(mask.view(), true, &pool).unwrap();
        assert_eq!((filled[[2, 2, 2]], filled[[2, 0, 3]], filled[[2, 4, 5]]), (1, 0, 1));
    }

    #[test]
    fn an_empty_image_has_no_components() {
        let pool = Pool::new(1);
        for shape in [[0, 4, 4], [4, 0, 4], [4, 4, 0], [2, 2, 2]] {
            let mask = Array3::<u8>::zeros(shape);
            let found = label(mask.view(), Connectivity::Corners, &pool).unwrap();
            assert!(found.list().is_empty());
            assert_eq!(found.paint(&pool).unwrap().dim(), (shape[0], shape[1], shape[2]));
        }
    }
}
