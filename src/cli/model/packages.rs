//! `scanside model list | info | check | install | import | features`: packages, and what the exam computes for a forest to learn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use scanside::exam::chest_ct::{ChestCt, features::NAMES};
use scanside::infer::monai::{self, Supplement};
use scanside::infer::package::{Models, Package, PackageError, Trust, hex};
use scanside::pool::Pool;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cli::{Failure, Steps, open::open_volume, print, print_json};

/// Where packages are, and whom to believe.
#[derive(clap::Args)]
pub struct Place {
    /// Folder of model packages that replace the built-in ones of the same name
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Refuse packages that are not signed with the private half of this ed25519 key (64 hexadecimal digits)
    #[arg(long, value_name = "HEX", value_parser = Trust::demanding)]
    signed_by: Option<Trust>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

impl Place {
    fn models(&self) -> Models {
        Models::new(self.models.clone(), self.trust())
    }

    fn trust(&self) -> Trust {
        self.signed_by.clone().unwrap_or_default()
    }

    /// A package by its name, or from its own folder.
    fn find(&self, named: &str) -> Result<(Package, Option<PathBuf>), Failure> {
        let refused = |error: PackageError| match error {
            PackageError::Unknown { .. } => Failure::usage(error),
            other => Failure::impossible(other),
        };
        let path = Path::new(named);
        if named.contains('/') || path.join("model.toml").is_file() {
            let package = Package::read(path, &self.trust()).map_err(refused)?;
            return Ok((package, Some(path.to_owned())));
        }
        let models = self.models();
        let package = models.package(named).map_err(refused)?;
        let place = models.list().into_iter().find(|(name, _)| name == named).and_then(|(_, dir)| dir);
        Ok((package, place))
    }
}

/// Arguments of `scanside model list`.
#[derive(clap::Args)]
pub struct List {
    #[command(flatten)]
    place: Place,
}

/// Prints every package.
pub fn list(arguments: &List) -> Result<(), Failure> {
    let models = arguments.place.models();
    let mut rows = Vec::new();
    let mut text = String::new();
    for (name, dir) in models.list() {
        let place = dir.map_or_else(|| "built in".to_owned(), |dir| dir.display().to_string());
        match models.package(&name) {
            Ok(package) => {
                let m = &package.manifest;
                let bytes: usize = package.files().map(|(_, bytes)| bytes.len()).sum();
                text += &format!("{name:<16} {:<8} {:>7.1} KiB  {place}\n    {}\n", m.version, bytes as f64 / 1024.0, m.summary);
                rows.push(json!({"name": name, "version": m.version, "summary": m.summary, "licence": m.licence,
                    "bytes": bytes, "place": place, "sha256": package.id().sha256}));
            }
            Err(error) => {
                text += &format!("{name:<16} refused           {place}\n    {error}\n");
                rows.push(json!({"name": name, "place": place, "refused": error.to_string()}));
            }
        }
    }
    if arguments.place.json { print_json(&json!({ "packages": rows })) } else { print(&text) }
}

/// Arguments of `scanside model info`.
#[derive(clap::Args)]
pub struct Info {
    /// Name of a package, or a folder with a model.toml
    #[arg(value_name = "NAME|DIR")]
    package: String,
    #[command(flatten)]
    place: Place,
}

/// Prints what a package says about itself.
pub fn info(arguments: &Info) -> Result<(), Failure> {
    let (package, place) = arguments.place.find(&arguments.package)?;
    let m = &package.manifest;
    if arguments.place.json {
        let mut value = serde_json::to_value(m).map_err(Failure::impossible)?;
        value["sha256"] = Value::from(package.id().sha256.clone());
        return print_json(&value);
    }
    let place = place.map_or_else(|| "built in".to_owned(), |dir| dir.display().to_string());
    let mut text = format!("{} {} ({place})\n{}\n\n", m.name, m.version, m.summary);
    text += &format!("sha256       {}\nlicence      {}\n", package.id().sha256, m.licence);
    if m.input.shape.is_empty() {
        let forest = package.forest().map_err(Failure::impossible)?;
        text += &format!("features     {}\n", forest.features().join(", "));
    } else {
        let input = &m.input;
        text += &format!(
            "sees         {} as {}, {:?} at {:?} mm (z, y, x; 0: the series' own), axes {}\n",
            input.modality,
            input.channels.join(", "),
            input.shape,
            input.spacing_mm,
            input.orientation
        );
        if let Some([low, high]) = input.window {
            text += &format!("window       {low} to {high} becomes {} to {}\n", input.range[0], input.range[1]);
        }
        text += &format!("says         {}: {} (stride {:?})\n", m.output.kind, m.output.labels.join(", "), m.output.stride);
    }
    for (name, value) in &m.thresholds {
        text += &format!("threshold    {name} = {value}\n");
    }
    for (name, value) in &m.provenance {
        text += &format!("{name:<12} {}\n", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    }
    if let Some(card) = package.file("CARD.md") {
        text += &format!("\n{}\n", String::from_utf8_lossy(card));
    }
    print(&text)
}

/// Arguments of `scanside model check`.
#[derive(clap::Args)]
pub struct Check {
    /// Name of a package, or a folder with a model.toml
    #[arg(value_name = "NAME|DIR")]
    package: String,
    /// Threads to compute on
    #[arg(long, default_value_t = 1)]
    threads: usize,
    #[command(flatten)]
    place: Place,
}

/// Checks a package on this machine: manifest, digests, signature, and what it says to its golden input.
pub fn check(arguments: &Check) -> Result<(), Failure> {
    let (package, dir) = arguments.place.find(&arguments.package)?;
    if let Some(dir) = &dir {
        let unlisted = package.unlisted(dir).map_err(Failure::impossible)?;
        if let Some(first) = unlisted.first() {
            let text = format!("package {}: {first} is in the folder and not in [files]", package.id().name);
            return Err(Failure::Impossible(text));
        }
    }
    let difference = package.check_golden(&Pool::new(arguments.threads)).map_err(Failure::impossible)?;
    let (files, id) = (package.files().count(), package.id());
    if arguments.place.json {
        return print_json(&json!({"name": id.name, "version": id.version, "sha256": id.sha256, "files": files,
            "golden_difference": difference}));
    }
    let golden = match difference {
        None => "no golden pair to compare with".to_owned(),
        Some(0.0) => "the golden output, to the bit".to_owned(),
        Some(d) => format!("the golden output within {d}"),
    };
    print(&format!("{} {}: manifest makes sense, {files} files as pinned, {golden}\n", id.name, id.version))
}

/// Arguments of `scanside model install`.
#[derive(clap::Args)]
pub struct Install {
    /// Folder of the package
    dir: PathBuf,
    #[command(flatten)]
    place: Place,
}

/// Checks a package and copies it into the models folder.
pub fn install(arguments: &Install) -> Result<(), Failure> {
    let Some(models) = &arguments.place.models else {
        return Err(Failure::usage("--models DIR says where to install to"));
    };
    let trust = arguments.place.trust();
    let candidate = Package::read(&arguments.dir, &trust).map_err(Failure::impossible)?;
    candidate.check_golden(&Pool::new(1)).map_err(Failure::impossible)?;
    let (package, place) = Package::install(&arguments.dir, models, &trust).map_err(Failure::impossible)?;
    let id = package.id();
    if arguments.place.json {
        return print_json(&json!({"name": id.name, "version": id.version, "sha256": id.sha256, "place": place}));
    }
    print(&format!("{} {} is now in {}\n", id.name, id.version, place.display()))
}

/// Arguments of `scanside model import`. The bundle tells channels, labels and patch shape; spacing and window stand in its
/// Python configuration and are asked for here.
#[derive(clap::Args)]
pub struct Import {
    /// The bundle's configs/metadata.json
    metadata: PathBuf,
    /// The network, exported as ONNX
    #[arg(long, value_name = "ONNX")]
    network: PathBuf,
    /// Folder of the package to be made; its name is the package's
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Working grid in mm, in the order of the network's axes (as the bundle's Spacingd has it)
    #[arg(long, value_name = "Z,Y,X", value_delimiter = ',', num_args = 3, default_values_t = [0.0, 0.0, 0.0])]
    spacing: Vec<f64>,
    /// Values that become the bundle's value range: low,high; without it, mean 0 and deviation 1
    #[arg(long, value_name = "LOW,HIGH", value_delimiter = ',', num_args = 2, allow_negative_numbers = true)]
    window: Option<Vec<f64>>,
    /// Where columns, rows and slices run: the bundle's Orientationd read backwards, SAR for its usual RAS
    #[arg(long, default_value = "SAR")]
    orientation: String,
    /// Every channel is a label by itself, and none the background (the bundle's post-processing has `sigmoid: true`)
    #[arg(long)]
    sigmoid: bool,
}

/// Makes a package of a MONAI bundle.
pub fn import(arguments: &Import) -> Result<(), Failure> {
    let read = |path: &Path| std::fs::read(path).map_err(|e| Failure::usage(format!("cannot read {}: {e}", path.display())));
    let (metadata, network) = (read(&arguments.metadata)?, read(&arguments.network)?);
    let out = &arguments.out;
    let ask = Supplement {
        name: out.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        spacing_mm: arguments.spacing.clone().try_into().map_err(|_| Failure::usage("--spacing takes three numbers"))?,
        window: arguments.window.as_ref().map(|w| [w[0], w[1]]),
        orientation: arguments.orientation.clone(),
        sigmoid: arguments.sigmoid,
    };
    let files = BTreeMap::from([("model.onnx".to_owned(), hex(&Sha256::digest(&network)))]);
    let made = monai::manifest(&metadata, &ask, files).map_err(Failure::impossible)?;
    let text = toml::to_string(&made).map_err(Failure::impossible)?;
    std::fs::create_dir_all(out)
        .and_then(|()| std::fs::write(out.join("model.onnx"), &network))
        .and_then(|()| std::fs::write(out.join("model.toml"), text))
        .map_err(|e| Failure::impossible(format!("cannot write {}: {e}", out.display())))?;
    // The network itself has the last word on its shapes.
    let package = Package::read(out, &Trust::default()).map_err(Failure::impossible)?;
    package.network().map_err(Failure::impossible)?;
    print(&format!("{} {} is in {}; it has no golden pair yet\n", made.name, made.version, out.display()))
}

/// Arguments of `scanside model features`.
#[derive(clap::Args)]
pub struct Features {
    /// A chest CT: DICOM folder or file, or NIfTI
    path: PathBuf,
    /// Threads that compute; without it, one per core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    #[command(flatten)]
    place: Place,
}

/// Prints every nodule candidate of a chest CT with its named features, what a forest is trained on, and the work of the
/// exam's networks.
pub fn features(arguments: &Features) -> Result<(), Failure> {
    let volume = open_volume(&arguments.path)?;
    let exam = ChestCt::load(&arguments.place.models()).map_err(Failure::impossible)?;
    let threads = arguments.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let steps = Steps::new();
    let rows = exam.features(&volume, &Pool::new(threads), &|p| steps.show(p.stage, p.done, p.total));
    steps.clear();
    let rows = rows.map_err(Failure::impossible)?;
    let gmac = exam.macs_done() as f64 / 1e9;
    if arguments.place.json {
        let candidates: Vec<Value> = rows
            .iter()
            .map(|row| {
                let features: serde_json::Map<String, Value> =
                    NAMES.iter().zip(&row.features).map(|(name, v)| ((*name).to_owned(), json!(v))).collect();
                json!({"centroid_lps_mm": row.centroid_lps_mm, "diameter_mm": row.diameter_mm,
                    "confidence": row.confidence, "features": features})
            })
            .collect();
        return print_json(&json!({"features": NAMES, "gmac": gmac, "candidates": candidates}));
    }
    let mut text = format!("{} candidates; the networks took {gmac:.1} GMAC\n", rows.len());
    for row in &rows {
        let [x, y, z] = row.centroid_lps_mm;
        text += &format!("\n{x:.1} {y:.1} {z:.1} mm LPS, confidence {:.3}\n", row.confidence);
        for (name, value) in NAMES.iter().zip(&row.features) {
            text += &format!("  {name:<24} {value:>12.3}\n");
        }
    }
    print(&text)
}
