//! `scanside register`: lays a moving image over a fixed one.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use ndarray::Array3;
use serde_json::json;

use scanside::geometry::Grid;
use scanside::imaging::plot;
use scanside::imaging::resample::same_grid;
use scanside::imaging::registration::{
    Image, Kind, Level, Metric, Optimiser, Outcome, Sampling, Settings, Start, Transform, register,
};
use scanside::volume::Volume;

use super::{Failure, print, print_json};
use super::open::open_volume;
use super::output::write_file;
use super::resample::{How, Job};
use super::values::{check_output, pool};

/// Finds how a moving image must be turned and shifted to lie on a fixed one, and writes it on the fixed grid.
///
/// Both are compared where patient space says they meet, first coarsely, then finer. Images of different contrasts (T1
/// and FLAIR, CT and MR) want `mattes`; images of one contrast may use `mean-squares` or `correlation`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The image that stays: .nii, .nii.gz, .nrrd or a DICOM folder.
    #[arg(long)]
    fixed: PathBuf,
    /// The image that moves.
    #[arg(long)]
    moving: PathBuf,
    /// Where the moving image goes, on the grid of the fixed one (.nii, .nii.gz).
    #[arg(long)]
    out: PathBuf,
    /// What may change: shift; shift and turn; these and scale; any linear map.
    #[arg(long, value_enum, default_value = "rigid")]
    transform: KindName,
    /// What is compared.
    #[arg(long, value_enum, default_value = "mattes")]
    metric: MetricName,
    /// Bins on each side of the joint histogram of `mattes`.
    #[arg(long, default_value_t = 50)]
    bins: usize,
    /// Steps on each level of the pyramid, at most.
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// Voxels of the fixed image that are compared: all, every n-th, or places drawn by chance.
    #[arg(long, value_enum, default_value = "none")]
    sampling: SamplingName,
    /// Share of the voxels that `regular` and `random` take.
    #[arg(long, default_value_t = 0.05)]
    fraction: f64,
    /// The same seed draws the same places.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How steps are chosen.
    #[arg(long, value_enum, default_value = "quasi-newton")]
    optimiser: OptimiserName,
    /// Multiplies the estimated rate of `descent`.
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// By how much each level of the pyramid thins the fixed image, coarse to fine.
    #[arg(long, value_delimiter = ',', default_value = "4,2,1")]
    shrink: Vec<usize>,
    /// Gaussian smoothing of both images on each level, sigma in millimetres.
    #[arg(long, value_delimiter = ',', default_value = "2,1,0")]
    smooth: Vec<f64>,
    /// Where to begin: the best of the others; as patient space says; middles together; centres of mass together.
    #[arg(long, value_enum, default_value = "best")]
    init: StartName,
    /// Begin at the transform of an ITK file instead; it must be of the kind of --transform.
    #[arg(long, value_name = "T.tfm")]
    initial_transform: Option<PathBuf>,
    /// Compare only where this image, on the grid of the fixed one, is not 0.
    #[arg(long)]
    fixed_mask: Option<PathBuf>,
    /// Compare only where this image, on the grid of the moving one, is not 0.
    #[arg(long)]
    moving_mask: Option<PathBuf>,
    /// How values between voxels are found for --out.
    #[arg(long, value_enum, default_value = "linear")]
    interpolation: How,
    /// The value of --out where the moving image has nothing [default: the least value of the moving image].
    #[arg(long, allow_negative_numbers = true)]
    outside: Option<f32>,
    /// Write the transform, fixed to moving, as ITK and SimpleITK read it.
    #[arg(long, value_name = "T.tfm")]
    save_transform: Option<PathBuf>,
    /// Draw the metric over the steps.
    #[arg(long, value_name = "P.png")]
    plot: Option<PathBuf>,
    /// Threads to compute on [default: all cores]. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object: final metric, iterations, transform parameters, matrix, why it stopped.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum KindName {
    Translation,
    Rigid,
    Similarity,
    Affine,
}

#[derive(Clone, Copy, ValueEnum)]
enum MetricName {
    Mattes,
    MeanSquares,
    Correlation,
}

#[derive(Clone, Copy, ValueEnum)]
enum SamplingName {
    None,
    Regular,
    Random,
}

#[derive(Clone, Copy, ValueEnum)]
enum OptimiserName {
    QuasiNewton,
    RegularStep,
    Descent,
}

#[derive(Clone, Copy, ValueEnum)]
enum StartName {
    Best,
    PatientSpace,
    Geometry,
    Moments,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let settings = settings(&arguments)?;
    check_output(&arguments.out)?;
    let pool = pool(arguments.threads);
    let fixed = open_volume(&arguments.fixed)?;
    let moving = open_volume(&arguments.moving)?;
    let masks = [(&arguments.fixed_mask, &fixed), (&arguments.moving_mask, &moving)].map(|(path, of)| mask(path.as_deref(), of));
    let [fixed_mask, moving_mask] = masks;
    let (fixed_mask, moving_mask) = (fixed_mask?, moving_mask?);
    let fixed_voxels = fixed.to_f32(0..fixed.shape()[0]);
    let moving_voxels = moving.to_f32(0..moving.shape()[0]);
    let fixed_image =
        Image { voxels: fixed_voxels.view(), affine: fixed.affine(), mask: fixed_mask.as_ref().map(|m| m.view()) };
    let moving_image =
        Image { voxels: moving_voxels.view(), affine: moving.affine(), mask: moving_mask.as_ref().map(|m| m.view()) };

    let bar = if std::io::stderr().is_terminal() {
        indicatif::ProgressBar::new((settings.steps * settings.levels.len()) as u64)
    } else {
        indicatif::ProgressBar::hidden()
    };
    let style = indicatif::ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").map_err(Failure::impossible)?;
    bar.set_style(style);
    let outcome = register(&fixed_image, &moving_image, &settings, &pool, |progress| {
        bar.set_position((progress.level * settings.steps + progress.step) as u64);
        bar.set_message(format!("level {} metric {:.6} step {:.3} mm", progress.level + 1, progress.metric, progress.step_mm));
    });
    bar.finish_and_clear();
    let outcome = outcome.map_err(|error| {
        Failure::impossible(format!("{} onto {}: {error}", arguments.moving.display(), arguments.fixed.display()))
    })?;

    let least = moving_voxels.iter().copied().fold(f32::INFINITY, f32::min);
    drop((fixed_voxels, moving_voxels));
    let grid = fixed.grid();
    let carried = outcome.transform.carry(&grid.affine).map_err(Failure::impossible)?;
    let job = Job {
        volume: &moving,
        how: arguments.interpolation,
        places: Grid { affine: carried, ..grid },
        affine: grid.affine,
        outside: arguments.outside.map_or(f64::from(least), f64::from),
        float: false,
    };
    job.write(&arguments.moving, &arguments.out, &pool)?;
    if let Some(path) = &arguments.save_transform {
        write_file(path, outcome.transform.to_tfm().as_bytes())?;
    }
    if let Some(path) = &arguments.plot {
        let values: Vec<f64> = outcome.history.iter().map(|p| p.metric).collect();
        let marks: Vec<usize> =
            (1..values.len()).filter(|n| outcome.history[*n].level != outcome.history[*n - 1].level).collect();
        let mut png = Vec::new();
        let title = format!("{} over steps, less is better; a curve for each level", metric_name(settings.metric));
        plot::curve(&title, "step", &values, &marks).write_png(&mut png).map_err(Failure::impossible)?;
        write_file(path, &png)?;
    }
    tell(&arguments, &settings, &outcome)
}

fn settings(arguments: &Arguments) -> Result<Settings, Failure> {
    if arguments.shrink.len() != arguments.smooth.len() {
        return Err(Failure::usage("--shrink and --smooth need one number for each level, so equally many"));
    }
    let start = match (&arguments.initial_transform, arguments.init) {
        (Some(path), _) => Start::Given(read_transform(path)?),
        (None, StartName::Best) => Start::Best,
        (None, StartName::PatientSpace) => Start::PatientSpace,
        (None, StartName::Geometry) => Start::Geometry,
        (None, StartName::Moments) => Start::Moments,
    };
    Ok(Settings {
        kind: match arguments.transform {
            KindName::Translation => Kind::Translation,
            KindName::Rigid => Kind::Rigid,
            KindName::Similarity => Kind::Similarity,
            KindName::Affine => Kind::Affine,
        },
        metric: match arguments.metric {
            MetricName::Mattes => Metric::Mattes { bins: arguments.bins },
            MetricName::MeanSquares => Metric::MeanSquares,
            MetricName::Correlation => Metric::Correlation,
        },
        sampling: match arguments.sampling {
            SamplingName::None => Sampling::All,
            SamplingName::Regular => Sampling::Regular { fraction: arguments.fraction },
            SamplingName::Random => Sampling::Random { fraction: arguments.fraction, seed: arguments.seed },
        },
        optimiser: match arguments.optimiser {
            OptimiserName::QuasiNewton => Optimiser::QuasiNewton { least_step_mm: 0.005 },
            OptimiserName::RegularStep => Optimiser::RegularStep { first_step_mm: 0.0, least_step_mm: 0.005 },
            OptimiserName::Descent => Optimiser::Descent { rate: arguments.rate },
        },
        steps: arguments.steps,
        levels: arguments
            .shrink
            .iter()
            .zip(&arguments.smooth)
            .map(|(shrink, sigma_mm)| Level { shrink: *shrink, sigma_mm: *sigma_mm })
            .collect(),
        start,
    })
}

fn read_transform(path: &Path) -> Result<Transform, Failure> {
    /// A transform file is a few lines; a larger one is something else.
    const BYTES_MAX: u64 = 1 << 20;
    let named = |error: &dyn std::fmt::Display| Failure::usage(format!("{}: {error}", path.display()));
    if std::fs::metadata(path).map_err(|e| named(&e))?.len() > BYTES_MAX {
        return Err(named(&"too large for a transform file"));
    }
    Transform::from_tfm(&std::fs::read_to_string(path).map_err(|e| named(&e))?).map_err(|e| named(&e))
}

fn mask(path: Option<&Path>, of: &Volume) -> Result<Option<Array3<u8>>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let volume = open_volume(path)?;
    if !same_grid(&volume.grid(), &of.grid()) {
        return Err(Failure::impossible(format!("the mask {} is not on the grid of its image", path.display())));
    }
    Ok(Some(volume.to_f32(0..volume.shape()[0]).mapv(|v| u8::from(v != 0.0))))
}

fn metric_name(metric: Metric) -> &'static str {
    match metric {
        Metric::Mattes { .. } => "mattes",
        Metric::MeanSquares => "mean-squares",
        Metric::Correlation => "correlation",
    }
}

fn tell(arguments: &Arguments, settings: &Settings, outcome: &Outcome) -> Result<(), Failure> {
    let transform = &outcome.transform;
    if arguments.json {
        return print_json(&json!({
            "metric": metric_name(settings.metric),
            "final_metric": outcome.metric,
            "overlap": outcome.overlap,
            "iterations": outcome.iterations,
            "stop": outcome.stop.code(),
            "stop_reason": outcome.stop.text(),
            "start": outcome.start,
            "transform": transform.kind().itk_name(),
            "parameters": transform.parameters(),
            "centre_lps_mm": transform.centre_lps_mm(),
            "matrix": transform.to_row_major(),
            "out": arguments.out,
        }));
    }
    let centre = transform.centre_lps_mm();
    let shift = scanside::geometry::sub(transform.apply(centre), centre);
    let mut text = format!(
        "metric      {} {:.6} (less is better), {:.1} % of the samples overlap\nsteps       {}, then {}; began at {}\n",
        metric_name(settings.metric),
        outcome.metric,
        100.0 * outcome.overlap,
        outcome.iterations,
        outcome.stop.text(),
        outcome.start
    );
    let [x, y, z] = shift;
    text += &format!("shift       {x:.3} {y:.3} {z:.3} mm (to the left, the back, the head) at the centre\n");
    if let (Kind::Rigid, [x, y, z, ..]) = (transform.kind(), transform.parameters()) {
        let [x, y, z] = [x, y, z].map(|angle| angle.to_degrees());
        text += &format!("turn        {x:.3} {y:.3} {z:.3} degrees about x, y, z\n");
    }
    print(&format!("{text}written     {}\n", arguments.out.display()))
}
