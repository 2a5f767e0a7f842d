//! `scanside smooth`: Gaussian, median, curvature flow.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::json;

use scanside::imaging::median::median;
use scanside::imaging::smooth::{Edge, curvature_flow, gaussian_in_place};
use scanside::nifti::write_array;
use scanside::with_voxel_type;

use super::open::open_volume;
use super::values::{about, check_output, parse_zyx, parse_zyx_whole, pool, real, write};
use super::{Failure, print, print_json};

/// Smooths an image: with a Gaussian, a median, or a flow that keeps edges.
///
/// Gaussians and the flow write 32-bit floats; the median keeps the image's own type. The Gaussian's values are those of
/// scipy.ndimage.gaussian_filter, the median's of median_filter, the flow's of SimpleITK's CurvatureFlow. A NaN spreads
/// over a Gaussian's reach; for a median it counts as greater than every number.
///
///   scanside smooth t1.nii.gz out.nii.gz --gaussian 2 --mm
///   scanside smooth ct.nii.gz out.nii.gz --median 1
///   scanside smooth ct-series/ out.nii.gz --curvature 5
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
#[command(group(clap::ArgGroup::new("filter").required(true).args(["gaussian", "median", "curvature"])))]
pub struct Arguments {
    /// The image: .nii, .nii.gz, .nrrd, a DICOM file or folder.
    input: PathBuf,
    /// Where the result goes: .nii or .nii.gz.
    output: PathBuf,
    /// A Gaussian of this sigma in voxels (one number, or Z,Y,X); 0 leaves an axis alone.
    #[arg(long, value_name = "SIGMA", value_parser = parse_zyx)]
    gaussian: Option<[f64; 3]>,
    /// Sigma is in millimetres.
    #[arg(long, requires = "gaussian")]
    mm: bool,
    /// The median of all voxels within this many along each axis (one number, or Z,Y,X): 1 is a 3 x 3 x 3 window.
    #[arg(long, value_name = "RADIUS", value_parser = parse_zyx_whole)]
    median: Option<[usize; 3]>,
    /// So many steps of curvature flow, which smooths along edges and not across them.
    #[arg(long, value_name = "STEPS")]
    curvature: Option<usize>,
    /// Length of such a step; at most 0.25, shorter for voxels finer than a millimetre.
    #[arg(long, default_value_t = 0.05, requires = "curvature")]
    time_step: f64,
    /// What lies beyond the border, for a Gaussian and a median.
    #[arg(long, value_enum, default_value_t = Beyond::Reflect)]
    edge: Beyond,
    /// Threads to compute on [default: all cores]. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object about what was done.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Beyond {
    /// The image mirrored at its border.
    Reflect,
    /// The border voxel for ever.
    Nearest,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    check_output(&arguments.output)?;
    let pool = pool(arguments.threads);
    let volume = open_volume(&arguments.input)?;
    let about = about(&arguments.input);
    let (affine, spacing) = (volume.affine(), volume.spacing());
    let edge = match arguments.edge {
        Beyond::Reflect => Edge::Reflect,
        Beyond::Nearest => Edge::Nearest,
    };
    let filter = if let Some(radius) = arguments.median {
        with_voxel_type!(volume.voxel_type(), T => {
            let stored = volume.stored::<T>().expect("the type is the volume's");
            let out = median(stored, radius, edge, &pool).map_err(|error| about(&error))?;
            write_array(&arguments.output, out.view(), affine, volume.rescale(), Some(&pool)).map_err(Failure::impossible)?;
        });
        json!({"median": {"radius_voxel": radius}})
    } else if let Some(iterations) = arguments.curvature {
        let out = curvature_flow(real(&volume), spacing, iterations, arguments.time_step, &pool);
        write(&arguments.output, out.map_err(|error| about(&error))?.view(), affine, &pool)?;
        json!({"curvature_flow": {"steps": iterations, "time_step": arguments.time_step}})
    } else {
        let sigma = arguments.gaussian.expect("the group asks for one of the three");
        let zyx_mm = spacing.zyx_mm();
        let sigma_voxel = if arguments.mm { std::array::from_fn(|a| sigma[a] / zyx_mm[a]) } else { sigma };
        let mut out = real(&volume);
        drop(volume);
        gaussian_in_place(&mut out, sigma_voxel, edge, &pool).map_err(|error| about(&error))?;
        write(&arguments.output, out.view(), affine, &pool)?;
        let sigma_mm: [f64; 3] = std::array::from_fn(|a| sigma_voxel[a] * zyx_mm[a]);
        json!({"gaussian": {"sigma_voxel": sigma_voxel, "sigma_mm": sigma_mm}})
    };
    if arguments.json {
        return print_json(&json!({"input": arguments.input, "output": arguments.output, "filter": filter}));
    }
    print(&format!("{}\n", arguments.output.display()))
}
