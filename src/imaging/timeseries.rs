//! Voxels over time: mean, standard deviation, temporal signal-to-noise, z-score, percent signal change.
//!
//! Two passes over the time points, one in memory at a time: [`Moments`] sees each frame, then [`Moments::z_score`] or
//! [`Moments::percent_change`] turns each frame into its output. Memory is that of a few frames, however long the run.

use crate::pool::{Fault, Pool};

/// Voxels handled by one task.
const CHUNK: usize = 1 << 14;

/// Sums over time, voxel by voxel.
///
/// Deviations are taken from the first frame, so that a large baseline costs no digits.
#[derive(Debug, Clone)]
pub struct Moments {
    frames: usize,
    cells: Vec<Cell>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    first: f64,
    sum: f64,
    squares: f64,
}

/// A frame of another size than the others.
#[derive(Debug, thiserror::Error)]
pub enum TimeSeriesError {
    /// Frames must be of one size.
    #[error("time point {frame} has {found} voxels, the first had {expected}")]
    Length {
        /// Which frame, from 0.
        frame: usize,
        /// Its voxels.
        found: usize,
        /// The first one's.
        expected: usize,
    },
    /// A task panicked.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl Moments {
    /// Nothing seen yet, of `voxels` voxels.
    pub fn new(voxels: usize) -> Self {
        Self { frames: 0, cells: vec![Cell::default(); voxels] }
    }

    /// Takes the next time point.
    ///
    /// # Errors
    /// [`TimeSeriesError::Length`].
    pub fn push(&mut self, frame: &[f32], pool: &Pool) -> Result<(), TimeSeriesError> {
        if frame.len() != self.cells.len() {
            return Err(TimeSeriesError::Length { frame: self.frames, found: frame.len(), expected: self.cells.len() });
        }
        let starts = self.frames == 0;
        pool.for_each_chunk(&mut self.cells, CHUNK, |n, cells| {
            for (cell, v) in cells.iter_mut().zip(&frame[n * CHUNK..]) {
                if starts {
                    cell.first = f64::from(*v);
                }
                let d = f64::from(*v) - cell.first;
                cell.sum += d;
                cell.squares += d * d;
            }
        })?;
        self.frames += 1;
        Ok(())
    }

    /// Time points seen.
    pub fn frames(&self) -> usize {
        self.frames
    }

    fn mean_std(&self, cell: &Cell) -> (f64, f64) {
        let n = self.frames as f64;
        let shift = cell.sum / n;
        (cell.first + shift, (cell.squares / n - shift * shift).max(0.0).sqrt())
    }

    fn map(&self, value: impl Fn(f64, f64) -> f64) -> Vec<f32> {
        self.cells.iter().map(|cell| self.mean_std(cell)).map(|(mean, std)| value(mean, std) as f32).collect()
    }

    /// Mean over time.
    pub fn mean(&self) -> Vec<f32> {
        self.map(|mean, _| mean)
    }

    /// Standard deviation over time, with divisor n (numpy's default).
    pub fn std(&self) -> Vec<f32> {
        self.map(|_, std| std)
    }

    /// Mean over standard deviation; 0 where a voxel never changes.
    pub fn tsnr(&self) -> Vec<f32> {
        self.map(|mean, std| if std == 0.0 { 0.0 } else { mean / std })
    }

    /// What turns a frame into z-scores: `(value - mean) / std`, 0 where a voxel never changes. A voxel that is NaN at
    /// one time point is NaN at all.
    pub fn z_score(&self) -> Change {
        self.change(|mean, std| (mean, if std == 0.0 { 0.0 } else { 1.0 / std }))
    }

    /// What turns a frame into percent signal change: `100 * (value - mean) / mean`, 0 where the mean is 0.
    pub fn percent_change(&self) -> Change {
        self.change(|mean, _| (mean, if mean == 0.0 { 0.0 } else { 100.0 / mean }))
    }

    fn change(&self, of: impl Fn(f64, f64) -> (f64, f64)) -> Change {
        Change(self.cells.iter().map(|cell| self.mean_std(cell)).map(|(mean, std)| of(mean, std)).collect())
    }
}

/// For each voxel, what to take away and what to multiply by.
#[derive(Debug, Clone)]
pub struct Change(Vec<(f64, f64)>);

impl Change {
    /// Changes one frame in place.
    ///
    /// # Errors
    /// [`TimeSeriesError::Length`].
    pub fn apply(&self, frame: &mut [f32], pool: &Pool) -> Result<(), TimeSeriesError> {
        if frame.len() != self.0.len() {
            return Err(TimeSeriesError::Length { frame: 0, found: frame.len(), expected: self.0.len() });
        }
        Ok(pool.for_each_chunk(frame, CHUNK, |n, frame| {
            for (v, (mean, factor)) in frame.iter_mut().zip(&self.0[n * CHUNK..]) {
                *v = ((f64::from(*v) - mean) * factor) as f32;
            }
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAMES: [[f32; 4]; 4] = [
        [1e6, 5.0, 1.0, 0.0],
        [1e6 + 1.0, 5.0, 2.0, 1.0],
        [1e6 + 2.0, 5.0, f32::NAN, -1.0],
        [1e6 + 5.0, 5.0, 4.0, 0.0],
    ];

    fn moments(pool: &Pool) -> Moments {
        let mut moments = Moments::new(4);
        for frame in &FRAMES {
            moments.push(frame, pool).unwrap();
        }
        moments
    }

    #[test]
    fn z_scores_are_numpys_also_on_a_high_baseline() {
        let pool = Pool::new(2);
        let moments = moments(&pool);
        // numpy.std([0, 1, 2, 5]) = 1.870828693386971
        assert_eq!(moments.mean()[..2], [1_000_002.0, 5.0]);
        assert!((moments.std()[0] - 1.870_828_7).abs() < 1e-6 && moments.std()[1] == 0.0);
        assert!((moments.tsnr()[0] - 534_523.2).abs() < 1.0 && moments.tsnr()[1] == 0.0);
        let mut frame = FRAMES[3];
        moments.z_score().apply(&mut frame, &pool).unwrap();
        assert!((frame[0] - 3.0 / 1.870_828_7).abs() < 1e-6);
        assert_eq!(frame[1], 0.0);
        assert!(frame[2].is_nan());
        assert_eq!(frame[3], 0.0);
    }

    #[test]
    fn percent_change_is_of_the_mean() {
        let pool = Pool::new(1);
        let mut frame = FRAMES[3];
        moments(&pool).percent_change().apply(&mut frame, &pool).unwrap();
        assert!((frame[0] - 100.0 * 3.0 / 1_000_002.0).abs() < 1e-9);
        assert_eq!((frame[1], frame[3]), (0.0, 0.0));
    }

    #[test]
    fn a_frame_of_another_size_is_refused() {
        let pool = Pool::new(1);
        let error = moments(&pool).push(&[0.0; 3], &pool).unwrap_err();
        assert!(matches!(error, TimeSeriesError::Length { frame: 4, found: 3, expected: 4 }));
    }
}
