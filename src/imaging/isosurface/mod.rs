//! Surfaces of equal value: marching cubes over slices, a few at a time, in patient space.
//!
//! The surface of a level is where the voxels cross it, placed by linear interpolation along the edges of the voxel
//! lattice (Lorensen and Cline, SIGGRAPH 1987) with ambiguous faces decided as in the module `cases`. Every vertex is
//! made once and shared; every edge that is not on the border of the volume belongs to exactly two triangles, also after
//! vertices are told apart by position alone, as STL does. Normals point from higher to lower values.
//!
//! Slices are read a few at a time and the surface leaves in [`Patch`]es, so memory does not grow with the volume; the
//! patches, and the order of everything in them, do not depend on the number of threads.

mod cases;
mod formats;
mod patch;
mod refine;

pub(crate) use formats::base64;
pub use formats::{Format, StlWriter, write_glb, write_gltf, write_obj, write_ply};
pub use patch::Patch;
pub use refine::{decimate, smooth};

use crate::geometry::{Grid, cross, dot, norm, sub};
use crate::pool::{Fault, Pool};

/// Layers of cells in one patch. Each patch reads one slice twice, so more layers cost less time and more memory: at
/// 16, 6 % of the slices are read again, and a patch of a 512 x 512 CT holds about 10 MiB.
const LAYERS: usize = 16;

/// No surface can be made.
#[derive(Debug, thiserror::Error)]
pub enum IsosurfaceError<E> {
    /// A surface needs at least two voxels along each axis.
    #[error("a surface needs a 3-D volume with 2 or more voxels along each axis, not {0:?} (slices, rows, columns)")]
    NotAVolume([usize; 3]),
    /// The level is NaN or infinite.
    #[error("the level {0} is not a number")]
    Level(f32),
    /// More than 2^32 vertices.
    #[error("the surface has more than 4,294,967,295 vertices")]
    TooLarge,
    /// The surface could not be written.
    #[error("{0}")]
    Sink(E),
    /// Ours to mend.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// What to take as the surface.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Level {
    /// Voxels at or above this value are inside. NaN is outside.
    pub value: f32,
    /// Close the surface where it meets the border of the volume, at the centres of the outermost voxels.
    pub cap: bool,
}

/// Sums over a surface.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measures {
    /// Vertices.
    pub vertices: u64,
    /// Triangles.
    pub triangles: u64,
    /// Area of the triangles in mm2. Caps count when they are made.
    pub area_mm2: f64,
    /// Volume of what is inside, between the centres of the outermost voxels, in mm3. An open surface is closed at
    /// the border for this sum, so the volume does not depend on caps.
    pub volume_mm3: f64,
    /// Voxels that are NaN, which count as outside.
    pub nan_voxels: u64,
    /// Least LPS coordinates, NaN when there is no vertex.
    pub least_lps_mm: [f32; 3],
    /// Greatest LPS coordinates.
    pub greatest_lps_mm: [f32; 3],
}

/// A surface in memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Surface {
    /// LPS millimetres.
    pub vertices: Vec<[f32; 3]>,
    /// Indices of vertices, turning left when seen from outside.
    pub triangles: Vec<[u32; 3]>,
}

impl Surface {
    /// Adds the next patch of [`extract`].
    pub fn push(&mut self, patch: &Patch) {
        self.vertices.truncate(patch.first_vertex as usize);
        self.vertices.extend_from_slice(&patch.vertices);
        self.triangles.extend(patch.triangles.iter().map(|t| t.map(|v| v + patch.first_vertex as u32)));
    }

    /// Sum of the areas of the triangles, in mm2.
    pub fn area_mm2(&self) -> f64 {
        self.triangles.iter().map(|t| norm(area_vector(t.map(|v| self.vertices[v as usize])))).sum()
    }

    /// Volume inside in mm3; means something for a closed surface only.
    pub fn volume_mm3(&self) -> f64 {
        let Some(first) = self.vertices.first() else { return 0.0 };
        let origin = first.map(f64::from);
        let apex = |v: u32| sub(self.vertices[v as usize].map(f64::from), origin);
        self.triangles.iter().map(|t| dot(apex(t[0]), cross(apex(t[1]), apex(t[2])))).sum::<f64>() / 6.0
    }

    /// Least and greatest coordinates.
    pub fn bounds(&self) -> ([f32; 3], [f32; 3]) {
        bounds(&self.vertices)
    }
}

fn bounds(vertices: &[[f32; 3]]) -> ([f32; 3], [f32; 3]) {
    let none = ([f32::NAN; 3], [f32::NAN; 3]);
    vertices.iter().fold(none, |(least, greatest), v| {
        (std::array::from_fn(|c| least[c].min(v[c])), std::array::from_fn(|c| greatest[c].max(v[c])))
    })
}

/// Normal of a triangle, as long as its area.
pub(crate) fn area_vector(corners: [[f32; 3]; 3]) -> [f64; 3] {
    let [a, b, c] = corners.map(|v| v.map(f64::from));
    cross(sub(b, a), sub(c, a)).map(|v| v / 2.0)
}

/// Marches through a volume and hands the surface to `sink`, patch by patch from slice 0 up.
///
/// `read` fills one slice (rows of columns) with real values, from several threads at a time.
///
/// # Errors
/// [`IsosurfaceError`]; what `sink` answers ends the march.
pub fn extract<E>(
    grid: Grid,
    level: Level,
    pool: &Pool,
    read: impl Fn(usize, &mut [f32]) + Sync,
    mut sink: impl FnMut(&Patch) -> Result<(), E>,
) -> Result<Measures, IsosurfaceError<E>> {
    if grid.shape.iter().any(|n| *n < 2) {
        return Err(IsosurfaceError::NotAVolume(grid.shape));
    }
    if !level.value.is_finite() {
        return Err(IsosurfaceError::Level(level.value));
    }
    let marcher = patch::Marcher::new(grid, level, &read);
    let layers = marcher.layers();
    let patches = layers.div_ceil(LAYERS);
    let mut total = Measures { least_lps_mm: [f32::NAN; 3], greatest_lps_mm: [f32::NAN; 3], ..Measures::default() };
    let mut first_vertex = 0u64;
    let mut n = 0;
    while n < patches {
        let wave = pool.threads().min(patches - n);
        let made = pool.map(wave, |m| {
            let start = (n + m) * LAYERS;
            marcher.patch(start..(start + LAYERS).min(layers))
        })?;
        for mut patch in made {
            patch.first_vertex = first_vertex;
            if first_vertex + patch.vertices.len() as u64 > u64::from(u32::MAX) {
                return Err(IsosurfaceError::TooLarge);
            }
            total.triangles += patch.triangles.len() as u64;
            total.vertices = first_vertex + patch.vertices.len() as u64;
            total.area_mm2 += patch.area_mm2;
            total.volume_mm3 += patch.volume_mm3;
            total.nan_voxels += patch.nan_voxels;
            let (least, greatest) = bounds(&patch.vertices);
            total.least_lps_mm = std::array::from_fn(|c| total.least_lps_mm[c].min(least[c]));
            total.greatest_lps_mm = std::array::from_fn(|c| total.greatest_lps_mm[c].max(greatest[c]));
            sink(&patch).map_err(IsosurfaceError::Sink)?;
            first_vertex += patch.last_plane as u64;
        }
        n += wave;
    }
    Ok(total)
}

#[cfg(test)]
mod tests;
