//! `scanside timeseries`: voxels over time.

use std::path::{Path, PathBuf};

use serde_json::json;

use scanside::imaging::timeseries::{Change, Moments};
use scanside::geometry::Grid;
use scanside::nifti::{NiftiSpec, NiftiWriter};
use scanside::pool::Pool;
use scanside::volume::{Rescale, VoxelType};

use super::values::{about, check_output, parse_slice, pool, resolve_slice};
use super::volumes::Volumes;
use super::{Failure, Steps, print, print_json};

/// Turns a 4-D series into z-scores, percent signal change, or a map of its mean, its deviation or its tSNR.
///
/// The file is read twice, one time point in memory at a time, so its length costs no memory. Results are 32-bit floats.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Every voxel to mean 0 and deviation 1 over time; one that never changes becomes 0. The deviation divides by n, as
    /// numpy's does.
    Normalize(Files),
    /// Every voxel to its change in percent of its mean over time; 0 where the mean is 0.
    Percent(Files),
    /// The mean over time, a 3-D map.
    Mean(Files),
    /// The standard deviation over time (divided by n), a 3-D map.
    Std(Files),
    /// Temporal signal-to-noise: mean over deviation, a 3-D map; 0 where a voxel never changes.
    Tsnr(Files),
}

#[derive(clap::Args)]
struct Files {
    /// The series: a 4-D .nii or .nii.gz, or a DICOM folder with several images at each place.
    input: PathBuf,
    /// Where the result goes: .nii or .nii.gz.
    output: PathBuf,
    /// Only the time points from A up to B and not with it, as in Python: 10: leaves out the first ten, -20: keeps the last twenty.
    #[arg(long, value_name = "A:B", allow_hyphen_values = true, value_parser = parse_slice)]
    range: Option<(Option<i64>, Option<i64>)>,
    /// Threads to compute on [default: all cores]. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object about what was done.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let (name, files) = match &arguments.action {
        Action::Normalize(files) => ("normalize", files),
        Action::Percent(files) => ("percent", files),
        Action::Mean(files) => ("mean", files),
        Action::Std(files) => ("std", files),
        Action::Tsnr(files) => ("tsnr", files),
    };
    check_output(&files.output)?;
    let mut series = Series::open(files)?;
    let pool = pool(files.threads);
    let steps = Steps::new();
    let moments = series.moments(&pool, &steps)?;
    match &arguments.action {
        Action::Normalize(_) => series.write_changed(&files.output, &moments.z_score(), &pool, &steps)?,
        Action::Percent(_) => series.write_changed(&files.output, &moments.percent_change(), &pool, &steps)?,
        Action::Mean(_) => series.write_map(&files.output, &moments.mean(), &pool)?,
        Action::Std(_) => series.write_map(&files.output, &moments.std(), &pool)?,
        Action::Tsnr(_) => series.write_map(&files.output, &moments.tsnr(), &pool)?,
    }
    steps.clear();
    if files.json {
        return print_json(&json!({
            "input": files.input,
            "output": files.output,
            "action": name,
            "shape": series.grid.shape,
            "time_points": series.range.len(),
            "range": [series.range.start, series.range.end],
            "of": series.volumes,
            "repetition_s": series.repetition_s,
        }));
    }
    print(&format!("{} time points of {}, from {}\n", series.range.len(), series.volumes, series.range.start))
}

/// The time points that are meant, one at a time.
struct Series {
    path: PathBuf,
    frames: Volumes,
    grid: Grid,
    volumes: usize,
    repetition_s: f64,
    range: std::ops::Range<usize>,
    frame: Vec<f32>,
}

impl Series {
    fn open(files: &Files) -> Result<Self, Failure> {
        let path = files.input.clone();
        let mut frames = Volumes::open(&path, None, false)?;
        let (grid, volumes) = (frames.grid()?, frames.count());
        if volumes < 2 {
            let text = match frames {
                Volumes::Nifti(_) => "header field dim: one time point where a series is wanted",
                _ => "one time point where a series is wanted",
            };
            return Err(about(&path)(&text));
        }
        let range = resolve_slice(files.range.unwrap_or((None, None)), volumes)
            .ok_or_else(|| Failure::usage(format!("--range: it holds none of the {volumes} time points")))?;
        let repetition_s = frames.repetition_s();
        let frame = vec![0.0; grid.voxels()];
        Ok(Self { path, frames, grid, volumes, repetition_s, range, frame })
    }

    fn read(&mut self, t: usize) -> Result<(), Failure> {
        self.frames.read_f32(t, &mut self.frame)
    }

    fn moments(&mut self, pool: &Pool, steps: &Steps) -> Result<Moments, Failure> {
        let mut moments = Moments::new(self.frame.len());
        for (n, t) in self.range.clone().enumerate() {
            self.read(t)?;
            moments.push(&self.frame, pool).map_err(|error| about(&self.path)(&error))?;
            steps.show("measuring", n + 1, self.range.len());
        }
        Ok(moments)
    }

    fn writer<'p>(&self, output: &Path, volumes: usize, pool: &'p Pool) -> Result<NiftiWriter<'p>, Failure> {
        let spec = NiftiSpec {
            shape: self.grid.shape,
            volumes,
            affine: self.grid.affine,
            voxel: VoxelType::F32,
            rescale: Rescale::IDENTITY,
            repetition_s: if volumes > 1 { self.repetition_s } else { 0.0 },
        };
        NiftiWriter::create(output, &spec, Some(pool)).map_err(Failure::impossible)
    }

    fn write_map(&self, output: &Path, map: &[f32], pool: &Pool) -> Result<(), Failure> {
        let mut writer = self.writer(output, 1, pool)?;
        writer.write_voxels(map).and_then(|()| writer.finish()).map_err(Failure::impossible)
    }

    fn write_changed(&mut self, output: &Path, change: &Change, pool: &Pool, steps: &Steps) -> Result<(), Failure> {
        let mut writer = self.writer(output, self.range.len(), pool)?;
        for (n, t) in self.range.clone().enumerate() {
            self.read(t)?;
            change.apply(&mut self.frame, pool).map_err(|error| about(&self.path)(&error))?;
            writer.write_voxels(&self.frame).map_err(Failure::impossible)?;
            steps.show("writing", n + 1, self.range.len());
        }
        writer.finish().map_err(Failure::impossible)
    }
}
