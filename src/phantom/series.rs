//! The phantom as a DICOM series, image by image.

use super::Phantom;
use crate::dicom::TransferSyntax;
use crate::dicom::build::{BuildError, SeriesTemplate, SliceTemplate};
use crate::geometry::Plane;
use crate::study::{Modality, Uid};
use crate::volume::{Rescale, VoxelType};

impl Phantom {
    /// What the images of the phantom's series have in common. The same phantom has the same UIDs, so that sending it
    /// twice is sending it once; `name` tells phantoms of the same options apart.
    pub fn series(&self, name: &str) -> SeriesTemplate {
        let [slices, rows, columns] = self.grid.shape;
        let seed = format!("phantom {name} {} {slices} {rows} {columns} {:?}", self.seed, self.truth);
        let uid = |what: &str| Uid::derived(format!("{seed} {what}").as_bytes());
        SeriesTemplate {
            modality: Modality::Ct,
            study: uid("study"),
            series: uid("series"),
            frame_of_reference: uid("frame of reference"),
            patient_name: "Phantom^Chest".into(),
            patient_id: format!("PHANTOM-{}", self.seed),
            description: "Chest phantom, no patient".into(),
            date_time: ["20260101".into(), "120000".into()],
            series_number: 1,
            size: [rows, columns],
            voxel: VoxelType::I16,
            bits_stored: 16,
            thickness_mm: self.grid.spacing().zyx_mm()[0],
            window: Some([-600.0, 1500.0]),
            regions: Vec::new(),
            more: Vec::new(),
        }
    }

    /// Slice `k` as a DICOM file (PS3.10), explicit little endian.
    ///
    /// # Errors
    /// [`BuildError`].
    ///
    /// # Panics
    /// When `k` is outside.
    pub fn image(&self, series: &SeriesTemplate, k: usize) -> Result<Vec<u8>, BuildError> {
        let [_, rows, columns] = self.grid.shape;
        let mut hu = vec![0i16; rows * columns];
        self.draw(k, &mut hu);
        let pixels: Vec<u8> = hu.iter().flat_map(|v| v.to_le_bytes()).collect();
        let [_, row_mm, column_mm] = self.grid.spacing().zyx_mm();
        let position = self.grid.affine.kji_to_lps([k as f64, 0.0, 0.0]);
        let plane = Plane::new(position, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [row_mm, column_mm]).ok();
        let slice = SliceTemplate {
            number: k + 1,
            plane,
            rescale: Rescale::IDENTITY,
            image_type: "DERIVED\\SECONDARY\\AXIAL",
            pixels: &pixels,
        };
        let syntax = TransferSyntax::find(EXPLICIT_LITTLE).expect("every box reads explicit little endian");
        series.image(&slice, syntax)
    }
}

const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";
