//! Lungs: a network on every slice or every 2.5 mm, sides made sure of in three dimensions, each side closed by a hull.
//!
//! A [`LungSlice`] depends on one slice alone, so slices may be segmented as they arrive, in any order. [`Lungs`] puts
//! them together and answers at any place: is this lung, which side, is this inside the closed lung.

use ndarray::{Array2, ArrayViewD, ArrayViewMut2, IxDyn};

use crate::exam::hull::hull_rows;
use crate::finding::Laterality;
use crate::geometry::{Affine, cross};
use crate::infer::engine::{EngineError, Session};
use crate::infer::grid::{Filling, Frame, Line, NotAxial, Weights, resample_plane};
use crate::infer::manifest::Manifest;
use crate::pool::Pool;
use crate::volume::Volume;

/// Slices are segmented at least this far apart: the lung changes little over it, and thin slices would cost ten times.
pub const PITCH_MM: f64 = 2.5;

/// Steps of the lung's probability that a cell remembers.
const LEVELS: u8 = 7;
/// From this level on a cell is lung: a probability of one half.
const LUNG_LEVEL: u8 = 4;
/// Below it a voxel at the rim is lung: midway between lung and tissue, and what the training labels used.
const AIR_HU: f32 = -500.0;

// One cell of the working grid: bits 0-2 level, bit 3 left, bits 4 and 5 inside the closed right and left lung.
const LEVEL_BITS: u8 = 0b0111;
const LEFT_BIT: u8 = 0b1000;
const CLOSED: [u8; 2] = [0b01_0000, 0b10_0000];
const SEEN_BIT: u8 = 0b100_0000;

/// Rows, columns, spacing and direction of a slice: all that decides how the network sees it, and nothing of its place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlaneGeometry {
    frame: Frame,
    rows: usize,
    columns: usize,
}

impl PlaneGeometry {
    /// The plane of a volume's slices.
    ///
    /// # Errors
    /// [`NotAxial`].
    pub fn of(shape: [usize; 3], affine: &Affine) -> Result<Self, NotAxial> {
        let (i, j) = (affine.step(0), affine.step(1));
        let plane = Affine::new(i, j, cross(i, j), [0.0; 3]).map_err(|_| NotAxial)?;
        Ok(Self { frame: Frame::new(&plane)?, rows: shape[1], columns: shape[2] })
    }
}

/// What the network said about one slice: a level and a side for each cell of its grid, two cells a byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LungSlice {
    cells: Box<[u8]>,
}

impl LungSlice {
    /// Whether the exam wants the slice at `z_mm` along the normal segmented, `step_mm` being the distance to its
    /// neighbours: yes for one slice in every 2.5 mm, decided from its own place alone.
    pub fn wanted(z_mm: f64, step_mm: f64) -> bool {
        (z_mm / PITCH_MM).floor() != ((z_mm - step_mm.abs()) / PITCH_MM).floor()
    }

    fn cell(&self, n: usize) -> u8 {
        self.cells[n / 2] >> (4 * (n % 2)) & 0b1111
    }
}

/// Runs the lung network on slices.
pub struct LungSegmenter<'n> {
    session: Session<'n>,
    shape: [usize; 2],
    spacing_mm: [f64; 2],
    window: [f32; 2],
    range: [f32; 2],
    pad: f32,
    probabilities: bool,
}

impl<'n> LungSegmenter<'n> {
    pub(super) fn new(manifest: &Manifest, session: Session<'n>) -> Self {
        let input = &manifest.input;
        let [_, rows, columns] = manifest.patch();
        let window = input.window.unwrap_or([-1000.0, 400.0]);
        Self {
            session,
            shape: [rows, columns],
            spacing_mm: [input.spacing_mm[1], input.spacing_mm[2]],
            window: window.map(|v| v as f32),
            range: input.range.map(|v| v as f32),
            pad: input.pad_value as f32,
            probabilities: manifest.output.kind == "softmax",
        }
    }

    /// Segments one slice (Hounsfield units, row by row): a pure function of its values and its plane.
    ///
    /// # Errors
    /// [`EngineError`].
    ///
    /// # Panics
    /// When `slice` has not the size of the plane.
    pub fn segment(&mut self, pool: &Pool, plane: &PlaneGeometry, slice: &[f32]) -> Result<LungSlice, EngineError> {
        assert_eq!(slice.len(), plane.rows * plane.columns);
        let [rows, columns] = self.shape;
        let [low, high] = self.window;
        let fill = Filling { pad: self.pad, ..Filling::CT };
        let extent = plane.frame.extent(plane.rows, plane.columns);
        let lines = [plane.frame.line_x(0.0), plane.frame.line_y(0.0)];
        let x = Weights::new(lines[0], extent[0], cell_line(lines[0], extent[0], self.spacing_mm[1], columns), columns);
        let y = Weights::new(lines[1], extent[1], cell_line(lines[1], extent[1], self.spacing_mm[0], rows), rows);
        let mut image = Array2::zeros((rows, columns));
        resample_plane(slice, plane.columns, plane.frame.transposed(), &x, &y, fill, image.view_mut());
        let [from, to] = self.range;
        image.mapv_inplace(|v| (v.clamp(low, high) - low) / (high - low) * (to - from) + from);
        let input = ArrayViewD::from_shape(IxDyn(&[1, 1, rows, columns]), image.as_slice().unwrap_or_default())
            .expect("one channel is the image itself");
        let outputs = self.session.run(pool, &[input])?;
        let size = rows * columns;
        let output = outputs.first().and_then(|o| o.as_slice()).filter(|o| o.len() == 3 * size);
        let output = output.ok_or_else(|| EngineError::Run("the lung network does not say three things a cell".into()))?;
        let (background, sides) = output.split_at(size);
        let (right, left) = sides.split_at(size);
        let mut cells = vec![0u8; size.div_ceil(2)];
        for n in 0..size {
            let level = self.level(background[n], right[n].max(left[n]));
            let side = if left[n] > right[n] { LEFT_BIT } else { 0 };
            let cell = if level == 0 { 0 } else { level | side };
            cells[n / 2] |= cell << (4 * (n % 2));
        }
        Ok(LungSlice { cells: cells.into() })
    }

    /// The lung's probability in steps of one seventh, without an exponential: boards differ in its last bit.
    fn level(&self, background: f32, lung: f32) -> u8 {
        /// Logits of the probabilities 1/14, 3/14 … 13/14.
        const LOGITS: [f32; 7] = [-2.564_949, -1.299_283, -0.587_787, 0.0, 0.587_787, 1.299_283, 2.564_949];
        let above = if self.probabilities {
            let p = 1.0 - background;
            (0..7).filter(|n| p >= (2 * n + 1) as f32 / 14.0).count()
        } else {
            LOGITS.iter().filter(|edge| lung - background >= **edge).count()
        };
        above as u8
    }
}

/// The network's cells along an axis whose voxels lie on `line`, both centred on the same point.
fn cell_line(line: Line, voxels: usize, spacing_mm: f64, cells: usize) -> Line {
    let centre = line.at((voxels as f64 - 1.0) / 2.0);
    Line { first_mm: centre - spacing_mm * (cells as f64 - 1.0) / 2.0, step_mm: spacing_mm }
}

/// Two rows of cells and the columns they stand for.
type Blend = (Vec<f32>, Vec<f32>, (usize, usize));

/// Both lungs of a volume.
#[derive(Debug, Clone)]
pub struct Lungs {
    frame: Frame,
    voxels: [usize; 3],
    /// Places of the segmented slices along the normal, ascending.
    z_mm: Vec<f64>,
    /// Cells of one slice: rows to the back, columns to the left.
    shape: [usize; 2],
    spacing_mm: [f64; 2],
    cells: Vec<u8>,
    /// Mean column of the right and the left lung, in cells.
    centres: [f64; 2],
}

impl Lungs {
    /// Slices of the volume to segment, foot to head.
    pub fn slices_wanted(frame: &Frame, slices: usize) -> Vec<usize> {
        let step = frame.slice_step_mm();
        let mut wanted: Vec<usize> =
            (0..slices).filter(|k| LungSlice::wanted(frame.slice_mm(*k as f64), step)).collect();
        if wanted.is_empty() {
            // Less than 2.5 mm of body: the middle slice stands for all.
            wanted.push(slices / 2);
        }
        if step < 0.0 {
            wanted.reverse();
        }
        wanted
    }

    /// Puts segmented slices together; `slices` as [`Lungs::slices_wanted`] has them, foot to head.
    pub(super) fn assemble(
        frame: Frame,
        voxels: [usize; 3],
        manifest: &Manifest,
        slices: impl Iterator<Item = (usize, LungSlice)>,
    ) -> Self {
        let [_, rows, columns] = manifest.patch();
        let spacing_mm = [manifest.input.spacing_mm[1], manifest.input.spacing_mm[2]];
        let mut lungs = Self { frame, voxels, z_mm: Vec::new(), shape: [rows, columns], spacing_mm, cells: Vec::new(), centres: [0.0; 2] };
        for (k, slice) in slices {
            lungs.z_mm.push(frame.slice_mm(k as f64));
            lungs.cells.extend((0..rows * columns).map(|n| slice.cell(n)));
        }
        lungs.settle_sides();
        let middle = columns as f64 / 2.0;
        lungs.centres = [lungs.centre_x(false).unwrap_or(middle), lungs.centre_x(true).unwrap_or(middle)];
        lungs.close(manifest.threshold("hull_growth_max", 1.6));
        lungs
    }

    fn plane(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Millilitres of one cell of segmented slice `n`.
    fn cell_ml(&self, n: usize) -> f64 {
        let below = if n > 0 { self.z_mm[n] - self.z_mm[n - 1] } else { PITCH_MM };
        below * self.spacing_mm[0] * self.spacing_mm[1] / 1000.0
    }

    /// Three-dimensional good order: each side one large piece, small pieces joined to what they touch or dropped, and
    /// the side on the patient's left called left.
    fn settle_sides(&mut self) {
        let mut pieces = self.pieces();
        let largest = |pieces: &[Piece], left: bool| {
            let of_side = pieces.iter().enumerate().filter(|(_, p)| p.left == left);
            of_side.max_by(|a, b| a.1.ml.total_cmp(&b.1.ml)).map(|(n, _)| n)
        };
        let mains = [largest(&pieces, false), largest(&pieces, true)];
        let main_ml = mains.map(|m| m.map_or(0.0, |n| pieces[n].ml));
        for n in 0..pieces.len() {
            let piece = &pieces[n];
            let own = usize::from(piece.left);
            if mains[own] == Some(n) {
                continue;
            }
            let touches = self.touches_other_side(piece);
            if touches && piece.ml < 0.5 * main_ml[1 - own] {
                self.repaint(piece, Some(!piece.left));
            } else if piece.ml < 0.05 * main_ml[own] {
                // What the training labels call lung is one piece of at least a twentieth: the rest is bowel or airway.
                self.repaint(piece, None);
            }
        }
        // Where the two sides are is anatomy, not opinion: the one further to the patient's left is the left lung.
        let [right, left] = [0, 1].map(|side| self.centre_x(side == 1));
        if let (Some(right), Some(left)) = (right, left)
            && left < right
        {
            for cell in self.cells.iter_mut().filter(|c| **c & LEVEL_BITS > 0) {
                *cell ^= LEFT_BIT;
            }
        }
        pieces.clear();
    }

    fn is_lung(cell: u8) -> bool {
        cell & LEVEL_BITS >= LUNG_LEVEL
    }

    /// Connected pieces of one side each, in the order of their first cell.
    fn pieces(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for seed in 0..self.cells.len() {
            let cell = self.cells[seed];
            if !Self::is_lung(cell) || cell & SEEN_BIT != 0 {
                continue;
            }
            let left = cell & LEFT_BIT != 0;
            let mut ml = 0.0;
            self.cells[seed] |= SEEN_BIT;
            let mut stack = vec![seed as u32];
            let mut members = Vec::new();
            while let Some(n) = stack.pop() {
                let n = n as usize;
                ml += self.cell_ml(n / self.plane());
                if members.len() <= PIECE_CELLS_MAX {
                    members.push(n as u32);
                }
                for other in self.neighbours(n).into_iter().flatten() {
                    let cell = self.cells[other];
                    if Self::is_lung(cell) && cell & SEEN_BIT == 0 && (cell & LEFT_BIT != 0) == left {
                        self.cells[other] |= SEEN_BIT;
                        stack.push(other as u32);
                    }
                }
            }
            // Only small pieces are ever repainted; a whole lung need not be remembered cell by cell.
            if members.len() > PIECE_CELLS_MAX {
                members = Vec::new();
            }
            pieces.push(Piece { left, ml, members });
        }
        for cell in &mut self.cells {
            *cell &= !SEEN_BIT;
        }
        pieces
    }

    fn neighbours(&self, n: usize) -> [Option<usize>; 6] {
        let [rows, columns] = self.shape;
        let plane = self.plane();
        let (z, y, x) = (n / plane, n % plane / columns, n % columns);
        [
            (z > 0).then(|| n - plane),
            (y > 0).then(|| n - columns),
            (x > 0).then(|| n - 1),
            (x + 1 < columns).then(|| n + 1),
            (y + 1 < rows).then(|| n + columns),
            (z + 1 < self.z_mm.len()).then(|| n + plane),
        ]
    }

    fn touches_other_side(&self, piece: &Piece) -> bool {
        piece.members.iter().any(|n| {
            self.neighbours(*n as usize).into_iter().flatten().any(|other| {
                let cell = self.cells[other];
                Self::is_lung(cell) && (cell & LEFT_BIT != 0) != piece.left
            })
        })
    }

    fn repaint(&mut self, piece: &Piece, left: Option<bool>) {
        for n in &piece.members {
            let cell = &mut self.cells[*n as usize];
            *cell = match left {
                Some(true) => *cell | LEFT_BIT,
                Some(false) => *cell & !LEFT_BIT,
                None => 0,
            };
        }
    }

    /// Mean column of a side, in cells.
    fn centre_x(&self, left: bool) -> Option<f64> {
        let of_side = self.cells.iter().enumerate().filter(|(_, c)| Self::is_lung(**c) && (**c & LEFT_BIT != 0) == left);
        let (count, sum) = of_side.fold((0u64, 0u64), |(count, sum), (n, _)| (count + 1, sum + (n % self.shape[1]) as u64));
        (count > 0).then(|| sum as f64 / count as f64)
    }

    /// Marks what is inside each lung when it is closed: its convex hull in each slice, where that is not much larger
    /// than the lung itself, and one slice further up and down.
    fn close(&mut self, growth_max: f64) {
        let [rows, columns] = self.shape;
        let plane = self.plane();
        let mut closed = vec![false; plane];
        for (bit, left) in [(CLOSED[0], false), (CLOSED[1], true)] {
            for z in 0..self.z_mm.len() {
                let cells = &self.cells[z * plane..(z + 1) * plane];
                let own = |n: usize| Self::is_lung(cells[n]) && (cells[n] & LEFT_BIT != 0) == left;
                let spans = hull_rows(rows, columns, own);
                let lung = (0..plane).filter(|n| own(*n)).count();
                let inside: usize = spans.iter().flatten().map(|(a, b)| b - a + 1).sum();
                closed.fill(false);
                if (inside as f64) <= growth_max * lung as f64 + 60.0 {
                    for (y, span) in spans.iter().enumerate() {
                        if let Some((a, b)) = span {
                            closed[y * columns + a..=y * columns + b].fill(true);
                        }
                    }
                } else {
                    // A lung bent round something large: only what is near it counts.
                    for n in (0..plane).filter(|n| own(*n)) {
                        let (y, x) = (n / columns, n % columns);
                        for y in y.saturating_sub(4)..(y + 5).min(rows) {
                            closed[y * columns + x.saturating_sub(4)..y * columns + (x + 5).min(columns)].fill(true);
                        }
                    }
                }
                for z in z.saturating_sub(1)..(z + 2).min(self.z_mm.len()) {
                    let cells = &mut self.cells[z * plane..(z + 1) * plane];
                    cells.iter_mut().zip(&closed).filter(|(_, closed)| **closed).for_each(|(cell, _)| *cell |= bit);
                }
            }
        }
        // A cell of one lung is never inside the other's hull.
        for cell in self.cells.iter_mut().filter(|c| Self::is_lung(**c)) {
            *cell &= !CLOSED[usize::from(*cell & LEFT_BIT == 0)];
        }
    }

    /// Millilitres of the network's lung cells, right and left: enough to tell whether there are lungs at all.
    pub fn rough_ml(&self) -> [f64; 2] {
        let mut ml = [0.0; 2];
        for (n, cell) in self.cells.iter().enumerate().filter(|(_, c)| Self::is_lung(**c)) {
            ml[usize::from(cell & LEFT_BIT != 0)] += self.cell_ml(n / self.plane());
        }
        ml
    }

    /// The frame places are measured on.
    pub fn frame(&self) -> &Frame {
        &self.frame
    }

    /// The box round the closed lungs, corners as z, y, x along the frame; None without lungs.
    pub fn bounds_mm(&self) -> Option<([f64; 3], [f64; 3])> {
        let mut low = [f64::INFINITY; 3];
        let mut high = [f64::NEG_INFINITY; 3];
        for z in 0..self.z_mm.len() {
            let cells = &self.cells[z * self.plane()..(z + 1) * self.plane()];
            for (n, _) in cells.iter().enumerate().filter(|(_, c)| **c & (CLOSED[0] | CLOSED[1]) != 0) {
                let [y, x] = self.cell_mm(z, n / self.shape[1], n % self.shape[1]);
                for (a, v) in [self.z_mm[z], y, x].into_iter().enumerate() {
                    low[a] = low[a].min(v);
                    high[a] = high[a].max(v);
                }
            }
        }
        (low[0] <= high[0]).then_some((low, high))
    }

    fn lines(&self, z: usize) -> [Line; 2] {
        let k = self.frame.slice_at(self.z_mm[z]).round();
        let extent = self.frame.extent(self.voxels[1], self.voxels[2]);
        let y = cell_line(self.frame.line_y(k), extent[1], self.spacing_mm[0], self.shape[0]);
        let x = cell_line(self.frame.line_x(k), extent[0], self.spacing_mm[1], self.shape[1]);
        [y, x]
    }

    fn cell_mm(&self, z: usize, y: usize, x: usize) -> [f64; 2] {
        let [along_y, along_x] = self.lines(z);
        [along_y.at(y as f64), along_x.at(x as f64)]
    }

    /// The cell at a place, when a segmented slice is near enough.
    fn cell_at(&self, zyx_mm: [f64; 3]) -> Option<u8> {
        let z = self.nearest_slice(zyx_mm[0])?;
        let [along_y, along_x] = self.lines(z);
        let y = along_y.index(zyx_mm[1]).round();
        let x = along_x.index(zyx_mm[2]).round();
        let inside = y >= 0.0 && x >= 0.0 && y < self.shape[0] as f64 && x < self.shape[1] as f64;
        inside.then(|| self.cells[z * self.plane() + y as usize * self.shape[1] + x as usize])
    }

    fn nearest_slice(&self, z_mm: f64) -> Option<usize> {
        let above = self.z_mm.partition_point(|z| *z < z_mm);
        let candidates = [above.checked_sub(1), (above < self.z_mm.len()).then_some(above)];
        let distance = |n: &usize| (self.z_mm[*n] - z_mm).abs();
        let nearest = candidates.into_iter().flatten().min_by(|a, b| distance(a).total_cmp(&distance(b)))?;
        (distance(&nearest) <= PITCH_MM.max(self.frame.slice_step_mm().abs()) * 1.01).then_some(nearest)
    }

    /// Which closed lung a place (z, y, x along the frame) is in.
    pub fn closed_side(&self, zyx_mm: [f64; 3]) -> Option<Laterality> {
        let cell = self.cell_at(zyx_mm)?;
        match (cell & CLOSED[0] != 0, cell & CLOSED[1] != 0) {
            (false, false) => None,
            (true, false) => Some(Laterality::Right),
            (false, true) => Some(Laterality::Left),
            // In both hulls (between the lungs): the side of the patient decides.
            (true, true) => {
                let [right, left] = self.centres;
                let [_, along_x] = self.lines(self.nearest_slice(zyx_mm[0])?);
                let x = along_x.index(zyx_mm[2]);
                Some(if (x - right).abs() < (x - left).abs() { Laterality::Right } else { Laterality::Left })
            }
        }
    }

    /// The cells along a row of places, and where they lie from right to left.
    fn row_at(&self, z_mm: f64, y_mm: f64) -> Option<(&[u8], Line)> {
        let z = self.nearest_slice(z_mm)?;
        let [along_y, along_x] = self.lines(z);
        let y = along_y.index(y_mm).round();
        (y >= 0.0 && y < self.shape[0] as f64).then(|| {
            let start = z * self.plane() + y as usize * self.shape[1];
            (&self.cells[start..start + self.shape[1]], along_x)
        })
    }

    /// Fills what lies outside the closed lungs, of a row of values at `x_mm`, so that a nodule on the pleura or the
    /// diaphragm stands free.
    pub fn fill_outside(&self, z_mm: f64, y_mm: f64, x_mm: Line, value: f32, row: &mut [f32]) {
        let Some((cells, along_x)) = self.row_at(z_mm, y_mm) else { return row.fill(value) };
        for (i, v) in row.iter_mut().enumerate() {
            let x = along_x.index(x_mm.at(i as f64)).round();
            let cell = if x >= 0.0 { cells.get(x as usize) } else { None };
            if cell.is_none_or(|cell| cell & (CLOSED[0] | CLOSED[1]) == 0) {
                *v = value;
            }
        }
    }

    /// Whether a candidate may lie here: in a closed lung or within 4 mm of one in plane, since a centre is a guess.
    pub fn gate(&self, zyx_mm: [f64; 3]) -> bool {
        let [z, y, x] = zyx_mm;
        [[0.0, 0.0], [-4.0, 0.0], [0.0, -4.0], [0.0, 4.0], [4.0, 0.0]].into_iter().any(|[dy, dx]| {
            self.cell_at([z, y + dy, x + dx]).is_some_and(|cell| cell & (CLOSED[0] | CLOSED[1]) != 0)
        })
    }

    /// Whether the network calls a place lung.
    pub fn is_lung_at(&self, zyx_mm: [f64; 3]) -> bool {
        self.cell_at(zyx_mm).is_some_and(Self::is_lung)
    }

    /// Whether any part of a box touches a closed lung.
    pub fn touches(&self, low_mm: [f64; 3], high_mm: [f64; 3]) -> bool {
        let from = self.z_mm.partition_point(|z| *z < low_mm[0] - PITCH_MM);
        let to = self.z_mm.partition_point(|z| *z <= high_mm[0] + PITCH_MM);
        (from..to).any(|z| {
            let [along_y, along_x] = self.lines(z);
            let range = |line: Line, low: f64, high: f64, cells: usize| {
                let first = line.index(low).round().clamp(0.0, cells as f64) as usize;
                let last = (line.index(high).round() + 1.0).clamp(0.0, cells as f64) as usize;
                first..last.max(first)
            };
            let columns = range(along_x, low_mm[2], high_mm[2], self.shape[1]);
            range(along_y, low_mm[1], high_mm[1], self.shape[0]).any(|y| {
                let row = z * self.plane() + y * self.shape[1];
                self.cells[row + columns.start..row + columns.end].iter().any(|c| c & (CLOSED[0] | CLOSED[1]) != 0)
            })
        })
    }

    /// Distance from a place to the nearest cell outside its closed lung, at most `reach_mm`.
    pub fn depth_mm(&self, zyx_mm: [f64; 3], reach_mm: f64) -> f64 {
        let Some(z) = self.nearest_slice(zyx_mm[0]) else { return 0.0 };
        let mut least = reach_mm * reach_mm;
        let reach = |spacing: f64| (reach_mm / spacing).ceil() as isize;
        let depth = reach(PITCH_MM.max(self.frame.slice_step_mm().abs()));
        for dz in -depth..=depth {
            let n = z as isize + dz;
            if n < 0 || n >= self.z_mm.len() as isize {
                continue;
            }
            let n = n as usize;
            let across = (self.z_mm[n] - zyx_mm[0]).powi(2);
            if across >= least {
                continue;
            }
            let [along_y, along_x] = self.lines(n);
            let (cy, cx) = (along_y.index(zyx_mm[1]).round() as isize, along_x.index(zyx_mm[2]).round() as isize);
            for y in cy - reach(self.spacing_mm[0])..=cy + reach(self.spacing_mm[0]) {
                let back = across + (along_y.at(y as f64) - zyx_mm[1]).powi(2);
                if back >= least {
                    continue;
                }
                for x in cx - reach(self.spacing_mm[1])..=cx + reach(self.spacing_mm[1]) {
                    let distance = back + (along_x.at(x as f64) - zyx_mm[2]).powi(2);
                    let inside = y >= 0
                        && x >= 0
                        && (y as usize) < self.shape[0]
                        && (x as usize) < self.shape[1]
                        && self.cells[n * self.plane() + y as usize * self.shape[1] + x as usize] & (CLOSED[0] | CLOSED[1])
                            != 0;
                    if !inside && distance < least {
                        least = distance;
                    }
                }
            }
        }
        least.sqrt()
    }

    /// Draws the lungs of slice `k` at full resolution: 0 nothing, 1 right, 2 left. `slice` holds its Hounsfield units.
    ///
    /// Well inside and well outside the network's word counts; on the rim, where its cells are coarser than the image,
    /// air is lung and tissue is not.
    ///
    /// # Panics
    /// When the lengths are not those of a slice.
    pub fn draw(&self, k: usize, slice: &[f32], out: &mut [u8]) {
        let [_, rows, columns] = self.voxels;
        assert!(slice.len() == rows * columns && out.len() == slice.len());
        out.fill(0);
        let Some((cells, sides, span)) = self.blend(self.frame.slice_mm(k as f64)) else { return };
        let extent = self.frame.extent(rows, columns);
        let (line_y, line_x) = (self.frame.line_y(k as f64), self.frame.line_x(k as f64));
        let along_y = cell_line(line_y, extent[1], self.spacing_mm[0], self.shape[0]);
        let along_x = cell_line(line_x, extent[0], self.spacing_mm[1], self.shape[1]);
        let lookup = |voxels: usize, line: Line, cells: Line, count: usize| -> Vec<Option<(usize, f32)>> {
            (0..voxels)
                .map(|v| {
                    let at = cells.index(line.at(v as f64));
                    let first = at.floor();
                    (first >= 0.0 && first + 1.0 < count as f64).then_some((first as usize, (at - first) as f32))
                })
                .collect()
        };
        let over_y = lookup(extent[1], line_y, along_y, self.shape[0]);
        let over_x = lookup(extent[0], line_x, along_x, self.shape[1]);
        let width = self.shape[1];
        let mut level = vec![0f32; width];
        let mut side = vec![0f32; width];
        for (y, cell_y) in over_y.iter().enumerate() {
            let Some((r, f)) = *cell_y else { continue };
            if r + 1 < span.0 || r > span.1 {
                continue;
            }
            for c in 0..width {
                let (a, b) = (r * width + c, (r + 1) * width + c);
                level[c] = cells[a] + (cells[b] - cells[a]) * f;
                side[c] = sides[a] + (sides[b] - sides[a]) * f;
            }
            for (x, cell_x) in over_x.iter().enumerate() {
                let Some((c, g)) = *cell_x else { continue };
                let p = level[c] + (level[c + 1] - level[c]) * g;
                if p < RIM[0] {
                    continue;
                }
                let n = if self.frame.transposed() { x * columns + y } else { y * columns + x };
                if p >= RIM[1] || slice[n] < AIR_HU {
                    out[n] = if side[c] + (side[c + 1] - side[c]) * g > 0.0 { 2 } else { 1 };
                }
            }
        }
    }

    /// The level and side (right below zero, left above) of each cell at a place along the normal, between the segmented
    /// slices; and the first and last row with any lung.
    fn blend(&self, z_mm: f64) -> Option<Blend> {
        self.nearest_slice(z_mm)?;
        let above = self.z_mm.partition_point(|z| *z < z_mm);
        let (a, b) = (above.saturating_sub(1), above.min(self.z_mm.len() - 1));
        let t = if a == b { 0.0 } else { ((z_mm - self.z_mm[a]) / (self.z_mm[b] - self.z_mm[a])) as f32 };
        let plane = self.plane();
        let signed = |cell: u8| {
            let level = f32::from(cell & LEVEL_BITS);
            if cell & LEFT_BIT != 0 { level } else { -level }
        };
        let mut levels = vec![0f32; plane];
        let mut sides = vec![0f32; plane];
        let (mut first, mut last) = (usize::MAX, 0);
        for n in 0..plane {
            let (p, q) = (self.cells[a * plane + n], self.cells[b * plane + n]);
            if (p | q) & LEVEL_BITS == 0 {
                continue;
            }
            let (low, high) = (f32::from(p & LEVEL_BITS), f32::from(q & LEVEL_BITS));
            levels[n] = (low + (high - low) * t) / f32::from(LEVELS);
            sides[n] = signed(p) + (signed(q) - signed(p)) * t;
            first = first.min(n / self.shape[1]);
            last = n / self.shape[1];
        }
        (first != usize::MAX).then_some((levels, sides, (first, last)))
    }

    /// Whether there may be any lung in slice `k`.
    pub fn reach_slice(&self, k: usize) -> bool {
        self.nearest_slice(self.frame.slice_mm(k as f64)).is_some()
    }

    /// Marks what of a window of slice `k` is inside a closed lung; rows and columns are `[first, step]`. The edge runs
    /// between the cells, at the place where interpolation gives one half.
    pub fn closed_window(&self, k: usize, rows: [usize; 2], columns: [usize; 2], mut out: ArrayViewMut2<'_, bool>) {
        out.fill(false);
        let Some(z) = self.nearest_slice(self.frame.slice_mm(k as f64)) else { return };
        let [cells_y, cells_x] = self.lines(z);
        let (line_y, line_x) = (self.frame.line_y(k as f64), self.frame.line_x(k as f64));
        let plane = &self.cells[z * self.plane()..(z + 1) * self.plane()];
        let width = self.shape[1];
        let closed = |y: usize, x: usize| if plane[y * width + x] & (CLOSED[0] | CLOSED[1]) != 0 { 1.0 } else { 0.0 };
        for ((j, i), marked) in out.indexed_iter_mut() {
            let (row, column) = ((rows[0] + j * rows[1]) as f64, (columns[0] + i * columns[1]) as f64);
            let (voxel_y, voxel_x) = if self.frame.transposed() { (column, row) } else { (row, column) };
            let y = cells_y.index(line_y.at(voxel_y));
            let x = cells_x.index(line_x.at(voxel_x));
            if y < 0.0 || x < 0.0 || y + 1.0 >= self.shape[0] as f64 || x + 1.0 >= width as f64 {
                continue;
            }
            let (r, c) = (y as usize, x as usize);
            let (f, g) = (y - r as f64, x - c as f64);
            let upper = closed(r, c) * (1.0 - g) + closed(r, c + 1) * g;
            let lower = closed(r + 1, c) * (1.0 - g) + closed(r + 1, c + 1) * g;
            *marked = upper * (1.0 - f) + lower * f >= 0.5;
        }
    }

    /// Draws slice `k` of `volume`.
    ///
    /// # Panics
    /// As [`Lungs::draw`].
    pub fn draw_from(&self, volume: &Volume, k: usize, out: &mut [u8]) {
        let mut slice = vec![0f32; out.len()];
        volume.read_slice_f32(k, &mut slice);
        self.draw(k, &slice, out);
    }
}

/// Probabilities between which the image, not the network, draws the edge.
const RIM: [f32; 2] = [0.15, 0.85];

/// A connected piece of one side; `members` is empty for a piece too large ever to be repainted.
struct Piece {
    left: bool,
    ml: f64,
    members: Vec<u32>,
}

/// Cells of about 5 litres at 3 x 3 x 2.5 mm.
const PIECE_CELLS_MAX: usize = 1 << 18;
