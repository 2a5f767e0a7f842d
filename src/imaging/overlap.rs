//! How alike two label maps are: Dice (1945), counted label by label.

use std::collections::BTreeMap;

use serde::Serialize;

/// Voxels of one label in two maps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Overlap {
    /// In the first.
    pub a: u64,
    /// In the second.
    pub b: u64,
    /// In both.
    pub both: u64,
}

impl Overlap {
    /// Twice the common voxels by the voxels of both; 1 where neither has any.
    pub fn dice(self) -> f64 {
        if self.a + self.b == 0 { 1.0 } else { 2.0 * self.both as f64 / (self.a + self.b) as f64 }
    }
}

/// Labels counted; more are no label map but an image.
pub const LABELS_MAX: usize = 1024;

/// Counts of two label maps, given piece by piece.
#[derive(Debug, Clone, Default)]
pub struct Overlaps {
    labels: BTreeMap<i64, Overlap>,
    any: Overlap,
}

/// A map has more than [`LABELS_MAX`] labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {LABELS_MAX} labels: this is an image, not a label map")]
pub struct TooManyLabels;

impl Overlaps {
    /// Counts the next voxels of both maps; values are rounded to whole labels, 0 is nothing.
    ///
    /// # Errors
    /// [`TooManyLabels`].
    ///
    /// # Panics
    /// When the pieces differ in length.
    pub fn add(&mut self, a: &[f32], b: &[f32]) -> Result<(), TooManyLabels> {
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (a.round() as i64, b.round() as i64);
            if a == 0 && b == 0 {
                continue;
            }
            self.any.a += u64::from(a != 0);
            self.any.b += u64::from(b != 0);
            self.any.both += u64::from(a != 0 && b != 0);
            if a != 0 {
                let cell = self.labels.entry(a).or_default();
                cell.a += 1;
                cell.both += u64::from(a == b);
            }
            if b != 0 {
                self.labels.entry(b).or_default().b += 1;
            }
            if self.labels.len() > LABELS_MAX {
                return Err(TooManyLabels);
            }
        }
        Ok(())
    }

    /// Each label but 0.
    pub fn labels(&self) -> impl Iterator<Item = (i64, Overlap)> + '_ {
        self.labels.iter().map(|(label, overlap)| (*label, *overlap))
    }

    /// All labels as one.
    pub fn any(&self) -> Overlap {
        self.any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dice_is_counted_label_by_label_and_for_all_together() {
        let mut overlaps = Overlaps::default();
        overlaps.add(&[1.0, 1.0, 2.0, 0.0], &[1.0, 2.0, 2.0, 0.0]).unwrap();
        overlaps.add(&[0.0, 3.0], &[1.0, 0.0]).unwrap();
        let dice: Vec<(i64, f64)> = overlaps.labels().map(|(label, o)| (label, o.dice())).collect();
        assert_eq!(dice, [(1, 0.5), (2, 2.0 / 3.0), (3, 0.0)]);
        assert_eq!(overlaps.any(), Overlap { a: 4, b: 4, both: 3 });
        assert_eq!(Overlap::default().dice(), 1.0);
    }

    #[test]
    fn an_image_is_no_label_map() {
        let image: Vec<f32> = (0..5000).map(|v| v as f32).collect();
        assert_eq!(Overlaps::default().add(&image, &image), Err(TooManyLabels));
    }
}
