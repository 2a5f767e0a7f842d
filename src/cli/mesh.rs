//! `scanside mesh`: the surface of a level or of labels.

use std::io::{self, BufWriter, IsTerminal};
use std::path::{Path, PathBuf};

use serde_json::json;

use scanside::imaging::isosurface::{
    Format, IsosurfaceError, Level, Measures, StlWriter, Surface, decimate, extract, smooth, write_glb, write_gltf,
    write_obj, write_ply,
};
use scanside::imaging::picture::Picture;
use scanside::imaging::render::{Renderer, View};
use scanside::pool::Pool;
use scanside::volume::Volume;

use super::{Failure, print, print_json};
use super::open::open_volume;
use super::output::{write_file, write_through};
use super::values::{check_labels, pool};

/// Makes the surface where an image crosses a level, or round labels, in patient space (LPS, millimetres).
///
/// The surface is watertight: every edge inside the volume belongs to two triangles. STL is written as the triangles
/// come, in memory that does not grow with the surface; the other formats, --smooth and --decimate hold it in memory.
#[derive(clap::Args)]
pub struct Arguments {
    /// The image: .nii, .nii.gz, .nrrd or a DICOM folder.
    input: PathBuf,
    /// Inside is what is at or above this value: -300 is the skin in a CT, 200 its bones.
    #[arg(long, allow_negative_numbers = true, required_unless_present = "labels")]
    level: Option<f32>,
    /// The image is a label map: inside are voxels with one of these labels.
    #[arg(long, value_delimiter = ',', conflicts_with = "level")]
    labels: Vec<i64>,
    /// Where the surface goes; the format follows the extension: .stl, .ply, .obj, .glb or .gltf.
    #[arg(long)]
    out: PathBuf,
    /// Close the surface where the border of the image cuts it.
    #[arg(long)]
    cap: bool,
    /// Smooth by so many steps of Taubin's filter, which does not shrink.
    #[arg(long, default_value_t = 0, value_name = "STEPS")]
    smooth: usize,
    /// Keep this share of the triangles, the ones that matter most.
    #[arg(long, value_name = "SHARE")]
    decimate: Option<f64>,
    /// Never move the surface by more than this when keeping fewer triangles, in millimetres.
    #[arg(long, default_value_t = 1.0, requires = "decimate", value_name = "MM")]
    max_error: f64,
    /// Draw the surface.
    #[arg(long, value_name = "P.png")]
    png: Option<PathBuf>,
    /// Where the picture is seen from: anterior, posterior, left, right, superior, inferior, or AZIMUTH,ELEVATION in
    /// degrees (0,0 in front of the patient, 90,0 on the patient's left). Repeat for several side by side.
    #[arg(long = "view", default_values = ["anterior", "left", "superior"], allow_hyphen_values = true)]
    views: Vec<String>,
    /// Side of each view in pixels.
    #[arg(long, default_value_t = 640)]
    size: usize,
    /// Threads to compute on [default: all cores]. The surface does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object: triangles, area, volume.
    #[arg(long)]
    json: bool,
}

/// Vertices that smoothing and decimation take on: they hold about 400 bytes for each.
const REFINED_VERTICES_MAX: u64 = 20_000_000;

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let extension = arguments.out.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let format = Format::of_extension(extension).ok_or_else(|| {
        Failure::usage(format!("{}: the extension must be stl, ply, obj, glb or gltf", arguments.out.display()))
    })?;
    let views = arguments
        .views
        .iter()
        .map(|text| View::parse(text).ok_or_else(|| Failure::usage(format!("--view {text}: no such view"))))
        .collect::<Result<Vec<View>, Failure>>()?;
    if arguments.decimate.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
        return Err(Failure::usage("--decimate: a share above 0 and at most 1"));
    }
    let pool = pool(arguments.threads);
    let volume = open_volume(&arguments.input)?;
    if !arguments.labels.is_empty() {
        let wanted: Vec<f64> = arguments.labels.iter().map(|label| *label as f64).collect();
        check_labels(&volume, &arguments.input, &wanted)?;
    }
    let source = Source::new(&volume, &arguments);
    let streamed = format == Format::Stl && arguments.smooth == 0 && arguments.decimate.is_none();
    let (measures, surface) = if streamed {
        let measures = write_through(&arguments.out, |file| {
            let mut stl = StlWriter::new(BufWriter::with_capacity(1 << 20, file))?;
            let measures = source.extract(&pool, true, |vertices, triangles| stl.write(vertices, triangles))?;
            stl.finish()?;
            Ok(measures)
        })?;
        (measures, None)
    } else {
        let mut surface = Surface::default();
        let measures = source.collect(&pool, &mut surface).map_err(|e| named(&arguments.input, &e))?;
        let (measures, surface) = refine(&arguments, measures, surface)?;
        write_through(&arguments.out, |file| {
            let out = BufWriter::with_capacity(1 << 20, file);
            match format {
                Format::Stl => {
                    let mut stl = StlWriter::new(out)?;
                    stl.write(&surface.vertices, &surface.triangles)?;
                    stl.finish().map(|_| ())
                }
                Format::Ply => write_ply(&surface, out),
                Format::Obj => write_obj(&surface, out),
                Format::Glb => write_glb(&surface, out),
                Format::Gltf => write_gltf(&surface, out),
            }
        })?;
        (measures, Some(surface))
    };
    if let Some(path) = &arguments.png {
        let picture = draw(&arguments, &views, &source, &measures, surface.as_ref(), &pool)?;
        let mut png = Vec::new();
        picture.write_png(&mut png).map_err(Failure::impossible)?;
        write_file(path, &png)?;
    }
    tell(&arguments, &measures)
}

/// The image as the march reads it.
struct Source<'a> {
    volume: &'a Volume,
    path: &'a Path,
    labels: &'a [i64],
    level: Level,
}

impl<'a> Source<'a> {
    fn new(volume: &'a Volume, arguments: &'a Arguments) -> Self {
        let level = Level { value: arguments.level.unwrap_or(0.5), cap: arguments.cap };
        Self { volume, path: &arguments.input, labels: &arguments.labels, level }
    }

    fn read(&self, k: usize, out: &mut [f32]) {
        self.volume.read_slice_f32(k, out);
        if !self.labels.is_empty() {
            for v in out {
                *v = f32::from(self.labels.iter().any(|l| *l as f32 == *v));
            }
        }
    }

    fn collect(&self, pool: &Pool, surface: &mut Surface) -> io::Result<Measures> {
        let bar = self.bar(true);
        let read = |k: usize, out: &mut [f32]| self.read(k, out);
        let measures = extract::<io::Error>(self.volume.grid(), self.level, pool, read, |patch| {
            surface.push(patch);
            bar.inc(1);
            Ok(())
        });
        bar.finish_and_clear();
        self.crossed(measures)
    }

    fn extract(
        &self,
        pool: &Pool,
        shown: bool,
        mut sink: impl FnMut(&[[f32; 3]], &[[u32; 3]]) -> io::Result<()>,
    ) -> io::Result<Measures> {
        let bar = self.bar(shown);
        let read = |k: usize, out: &mut [f32]| self.read(k, out);
        let measures = extract(self.volume.grid(), self.level, pool, read, |patch| {
            bar.inc(1);
            sink(&patch.vertices, &patch.triangles)
        });
        bar.finish_and_clear();
        self.crossed(measures)
    }

    fn bar(&self, shown: bool) -> indicatif::ProgressBar {
        let patches = (self.volume.shape()[0] as u64).div_ceil(16);
        if shown && io::stderr().is_terminal() { indicatif::ProgressBar::new(patches) } else { indicatif::ProgressBar::hidden() }
    }

    fn crossed(&self, measures: Result<Measures, IsosurfaceError<io::Error>>) -> io::Result<Measures> {
        let refuse = |text: String| Err(io::Error::new(io::ErrorKind::InvalidData, text));
        match measures {
            Ok(measures) if measures.triangles == 0 => {
                refuse(format!("{}: no voxel crosses {}: there is no surface", self.path.display(), self.level.value))
            }
            Ok(measures) => Ok(measures),
            Err(IsosurfaceError::Sink(error)) => Err(error),
            Err(error) => refuse(format!("{}: {error}", self.path.display())),
        }
    }
}

fn named(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    let text = error.to_string();
    let path = path.display().to_string();
    Failure::impossible(if text.contains(&path) { text } else { format!("{path}: {text}") })
}

fn refine(arguments: &Arguments, mut measures: Measures, mut surface: Surface) -> Result<(Measures, Surface), Failure> {
    if arguments.smooth == 0 && arguments.decimate.is_none() {
        return Ok((measures, surface));
    }
    if measures.vertices > REFINED_VERTICES_MAX {
        let text = format!("the surface has {} vertices, too many to smooth or decimate ({REFINED_VERTICES_MAX})", measures.vertices);
        return Err(named(&arguments.input, &text));
    }
    // What is beyond the border does not change: only the part that the triangles bound.
    let before = surface.volume_mm3();
    if arguments.smooth > 0 {
        smooth(&mut surface, arguments.smooth);
    }
    if let Some(share) = arguments.decimate {
        surface = decimate(&surface, (surface.triangles.len() as f64 * share) as usize, arguments.max_error);
    }
    measures.volume_mm3 += surface.volume_mm3() - before;
    measures.area_mm2 = surface.area_mm2();
    measures.vertices = surface.vertices.len() as u64;
    measures.triangles = surface.triangles.len() as u64;
    (measures.least_lps_mm, measures.greatest_lps_mm) = surface.bounds();
    Ok((measures, surface))
}

/// The views side by side. A surface that was streamed is made once more: cheaper than to keep it.
fn draw(
    arguments: &Arguments,
    views: &[View],
    source: &Source<'_>,
    measures: &Measures,
    surface: Option<&Surface>,
    pool: &Pool,
) -> Result<Picture, Failure> {
    let mut renderers: Vec<Renderer> = views
        .iter()
        .map(|view| Renderer::new(*view, measures.least_lps_mm, measures.greatest_lps_mm, arguments.size))
        .collect();
    match surface {
        Some(surface) => renderers.iter_mut().for_each(|r| r.draw(&surface.vertices, &surface.triangles)),
        None => {
            source
                .extract(pool, false, |vertices, triangles| {
                    renderers.iter_mut().for_each(|r| r.draw(vertices, triangles));
                    Ok(())
                })
                .map_err(|e| named(&arguments.input, &e))?;
        }
    }
    let pictures: Vec<Picture> = renderers.into_iter().zip(&arguments.views).map(|(r, name)| r.finish(name)).collect();
    let width = pictures.iter().map(Picture::width).sum();
    let mut all = Picture::new(width, pictures.iter().map(Picture::height).max().unwrap_or(1), [0; 3]);
    let mut left = 0;
    for picture in &pictures {
        all.paste(left, 0, picture);
        left += picture.width();
    }
    Ok(all)
}

fn tell(arguments: &Arguments, measures: &Measures) -> Result<(), Failure> {
    let Measures { vertices, triangles, area_mm2, volume_mm3, nan_voxels, least_lps_mm, greatest_lps_mm } = measures;
    if arguments.json {
        return print_json(&json!({
            "vertices": vertices, "triangles": triangles, "area_mm2": area_mm2, "volume_mm3": volume_mm3,
            "nan_voxels": nan_voxels, "least_lps_mm": least_lps_mm, "greatest_lps_mm": greatest_lps_mm,
            "level": arguments.level, "labels": arguments.labels, "capped": arguments.cap, "out": arguments.out,
        }));
    }
    let mut text = format!("{triangles} triangles, {vertices} vertices\n");
    text += &format!("area    {:.1} cm2\nvolume  {:.2} mL\n", area_mm2 / 100.0, volume_mm3 / 1000.0);
    if *nan_voxels > 0 {
        text += &format!("{nan_voxels} voxels are NaN; they count as outside\n");
    }
    print(&format!("{text}written {}\n", arguments.out.display()))
}
