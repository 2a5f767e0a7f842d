//! Model packages: a folder that explains itself, checked before anything of it runs.
//!
//! `model.toml` says what goes in and what comes out, and pins every other file of the package by its SHA-256. So the
//! digest of `model.toml` names the whole package, and an ed25519 signature over it (`model.sig`) signs the whole.
//! The default packages are inside the binary, or beside it on a board; a folder given with `--models` overrides them name by name.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use ed25519_dalek::VerifyingKey;
use ndarray::{ArrayD, IxDyn};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

mod store;

pub use store::Models;

use super::engine::{EngineError, Network};
use super::forest::{BadForest, Forest};
use super::manifest::{BadManifest, Kind, Manifest};
use super::signature::{self, Flaw};
pub use super::signature::hex;
use crate::pool::Pool;

/// A file larger than this is no network for a small board; without a cap a stray file in a folder would fill memory.
pub const FILE_BYTES_MAX: u64 = 64 << 20;
/// `model.toml` is written by people; a longer one is something else.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 20;

const MANIFEST: &str = "model.toml";
const SIGNATURE: &str = "model.sig";
const NETWORK: &str = "model.onnx";
const FOREST: &str = "forest.json";

/// Why a package is refused.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// A file that cannot be read or written.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// `read`, `write`.
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// No package of this name.
    #[error("there is no model package {name:?}; there are: {}", known.join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// `model.toml` makes no sense.
    #[error("package {package}: {source}")]
    Manifest {
        /// Which package.
        package: String,
        /// What is wrong.
        source: BadManifest,
    },
    /// A file is missing, not listed, or not what the manifest pins.
    #[error("package {package}: {file} {why}")]
    File {
        /// Which package.
        package: String,
        /// Which file.
        file: String,
        /// What is wrong with it.
        why: String,
    },
    /// No signature where one is demanded, or a wrong one.
    #[error("package {package}: {why}")]
    Signature {
        /// Which package.
        package: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The network does not load or does not run.
    #[error("package {package}: {source}")]
    Engine {
        /// Which package.
        package: String,
        /// The engine's answer.
        source: EngineError,
    },
    /// The forest does not load.
    #[error("package {package}: {source}")]
    Forest {
        /// Which package.
        package: String,
        /// What is wrong.
        source: BadForest,
    },
    /// The golden input does not give the golden output here.
    #[error("package {package}: {why}")]
    Golden {
        /// Which package.
        package: String,
        /// What differs, and by how much.
        why: String,
    },
    /// The network is not what the manifest says it is.
    #[error("package {package}: {why}")]
    Mismatch {
        /// Which package.
        package: String,
        /// What differs.
        why: String,
    },
}

/// What a package must show before it is believed.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    /// When set, every package from a folder must be signed with its private half.
    pub public_key: Option<VerifyingKey>,
}

impl Trust {
    /// A board that demands signatures by this ed25519 public key, 64 hexadecimal digits.
    ///
    /// # Errors
    /// A sentence when the text is no such key.
    pub fn demanding(public_key_hex: &str) -> Result<Self, String> {
        let key = signature::public_key(public_key_hex)?;
        Ok(Self { public_key: Some(key) })
    }
}

/// What the report says about a model: enough to get the very same one again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelId {
    /// Name of the package.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of its `model.toml`, which pins every other file.
    pub sha256: String,
}

/// A package whose manifest made sense and whose files are the pinned ones.
#[derive(Debug, Clone)]
pub struct Package {
    /// What `model.toml` says.
    pub manifest: Manifest,
    id: ModelId,
    files: BTreeMap<String, Cow<'static, [u8]>>,
}

impl Package {
    /// Reads and checks the package in a folder.
    ///
    /// # Errors
    /// [`PackageError`], with the reason, for whatever is not exactly as the manifest says.
    pub fn read(dir: &Path, trust: &Trust) -> Result<Self, PackageError> {
        let name = dir.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned());
        let text = read_capped(&dir.join(MANIFEST), MANIFEST_BYTES_MAX)?;
        if let Some(key) = &trust.public_key {
            let path = dir.join(SIGNATURE);
            let signature = match path.exists() {
                true => Some(read_capped(&path, 4096)?),
                false => None,
            };
            verify(&name, key, &text, signature.as_deref())?;
        }
        Self::assemble(&name, &text, |file| read_capped(&dir.join(file), FILE_BYTES_MAX).map(Cow::Owned))
    }

    /// One of the packages inside the binary.
    fn embedded(name: &str, files: &'static [(&'static str, &'static [u8])]) -> Result<Self, PackageError> {
        let find = |file: &str| {
            files.iter().find(|(path, _)| *path == file).map(|(_, bytes)| *bytes).ok_or_else(|| PackageError::File {
                package: name.into(),
                file: file.into(),
                why: "is missing".into(),
            })
        };
        Self::assemble(name, find(MANIFEST)?, |file| find(file).map(Cow::Borrowed))
    }

    fn assemble(
        name: &str,
        manifest: &[u8],
        read: impl Fn(&str) -> Result<Cow<'static, [u8]>, PackageError>,
    ) -> Result<Self, PackageError> {
        let bad = |source| PackageError::Manifest { package: name.into(), source };
        let text = std::str::from_utf8(manifest).map_err(|_| bad(BadManifest::new("model.toml", "is not UTF-8")))?;
        let parsed = Manifest::parse(text).map_err(bad)?;
        let mut files = BTreeMap::new();
        for (file, want) in &parsed.files {
            let bytes = read(file)?;
            let got = hex(&Sha256::digest(&bytes));
            if got != *want {
                return Err(PackageError::File {
                    package: name.into(),
                    file: file.clone(),
                    why: format!("is not the file the manifest pins: its SHA-256 is {got}, the manifest says {want}"),
                });
            }
            files.insert(file.clone(), bytes);
        }
        let main = if parsed.kind == Kind::Forest { FOREST } else { NETWORK };
        if !files.contains_key(main) {
            return Err(bad(BadManifest::new("files", format!("does not list {main}"))));
        }
        let id = ModelId {
            name: parsed.name.clone(),
            version: parsed.version.clone(),
            sha256: hex(&Sha256::digest(manifest)),
        };
        Ok(Self { manifest: parsed, id, files })
    }

    /// Name, version and digest for the report.
    pub fn id(&self) -> &ModelId {
        &self.id
    }

    /// The files of the package, `model.toml` left out.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_ref()))
    }

    /// One file.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(AsRef::as_ref)
    }

    /// Loads the network and compares its input with the manifest's.
    ///
    /// # Errors
    /// [`PackageError::Engine`], and [`PackageError::Mismatch`] when file and manifest disagree.
    pub fn network(&self) -> Result<Network, PackageError> {
        let package = || self.id.name.clone();
        let Some(onnx) = self.file(NETWORK) else {
            return Err(PackageError::Mismatch { package: package(), why: "a forest has no network to load".into() });
        };
        let network = Network::load(onnx).map_err(|source| PackageError::Engine { package: package(), source })?;
        let want = &self.manifest.input.shape;
        match network.input_shapes() {
            [got] if got == want => Ok(network),
            got => Err(PackageError::Mismatch {
                package: package(),
                why: format!("the manifest says one input of shape {want:?}, the network takes {got:?}"),
            }),
        }
    }

    /// Loads the forest.
    ///
    /// # Errors
    /// [`PackageError::Forest`], and [`PackageError::Mismatch`] when the package is of another kind.
    pub fn forest(&self) -> Result<Forest, PackageError> {
        let package = || self.id.name.clone();
        let Some(json) = self.file(FOREST) else {
            return Err(PackageError::Mismatch { package: package(), why: "holds no forest".into() });
        };
        Forest::parse(json).map_err(|source| PackageError::Forest { package: package(), source })
    }

    /// Runs the golden input on this very machine; the largest difference to the golden output, None without a pair.
    ///
    /// # Errors
    /// [`PackageError::Golden`] when it is larger than the manifest allows, and as [`Package::network`].
    pub fn check_golden(&self, pool: &Pool) -> Result<Option<f64>, PackageError> {
        let Some(golden) = &self.manifest.golden else { return Ok(None) };
        let wrong = |why: String| PackageError::Golden { package: self.id.name.clone(), why };
        let array = |name: &str, shape: &[usize]| {
            let bytes = numbers(name, self.file(name).unwrap_or_default(), shape).map_err(|why| wrong(format!("{name}: {why}")))?;
            let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            ArrayD::from_shape_vec(IxDyn(shape), values)
                .map_err(|_| wrong(format!("{name} has {} bytes, not those of {shape:?} numbers", bytes.len())))
        };
        let input = array(&golden.input, &golden.input_shape)?;
        let outputs = if self.manifest.kind == Kind::Forest {
            let forest = self.forest()?;
            let rows = input.as_slice().unwrap_or_default();
            let width = forest.features().len();
            if rows.len() % width != 0 {
                return Err(wrong(format!("{} numbers are no rows of {width} features", rows.len())));
            }
            let answers: Vec<f32> = rows
                .chunks(width)
                .map(|row| forest.evaluate(&row.iter().map(|v| f64::from(*v)).collect::<Vec<_>>()) as f32)
                .collect();
            vec![ArrayD::from_shape_vec(IxDyn(&[answers.len()]), answers).expect("one answer a row")]
        } else {
            let network = self.network()?;
            let engine = |source| PackageError::Engine { package: self.id.name.clone(), source };
            network.session().and_then(|mut session| session.run(pool, &[input.view()])).map_err(engine)?
        };
        if outputs.len() != golden.outputs.len() {
            return Err(wrong(format!("{} golden outputs, the network has {}", golden.outputs.len(), outputs.len())));
        }
        let mut largest: f64 = 0.0;
        for (n, got) in outputs.iter().enumerate() {
            let want = array(&golden.outputs[n], &golden.output_shapes[n])?;
            if want.len() != got.len() {
                return Err(wrong(format!("output {n} has the shape {:?}, the golden one {:?}", got.shape(), want.shape())));
            }
            for (a, b) in got.iter().zip(want.iter()) {
                let difference = f64::from((a - b).abs());
                largest = if difference.is_nan() { f64::INFINITY } else { largest.max(difference) };
            }
        }
        if largest > golden.tolerance {
            let allowed = golden.tolerance;
            return Err(wrong(format!("on this machine it differs from its golden output by {largest}, at most {allowed} is allowed")));
        }
        Ok(Some(largest))
    }
}

/// A golden file has no more bytes than this when it is unpacked.
const GOLDEN_BYTES_MAX: usize = 256 << 20;

/// The bytes of a golden file, unpacked where its name ends with `.gz`: no more than its shape asks for, and one.
fn numbers<'f>(name: &str, stored: &'f [u8], shape: &[usize]) -> std::io::Result<Cow<'f, [u8]>> {
    if !name.ends_with(".gz") {
        return Ok(Cow::Borrowed(stored));
    }
    let expected = shape.iter().fold(4usize, |bytes, n| bytes.saturating_mul(*n)).min(GOLDEN_BYTES_MAX);
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(stored).take(expected as u64 + 1).read_to_end(&mut bytes)?;
    Ok(Cow::Owned(bytes))
}

fn verify(package: &str, key: &VerifyingKey, text: &[u8], signature: Option<&[u8]>) -> Result<(), PackageError> {
    let refuse = |why| PackageError::Signature { package: package.into(), why };
    let bytes = signature.ok_or_else(|| refuse("this board takes signed packages only, and it has no model.sig"))?;
    signature::verify(key, text, bytes).map_err(|flaw| {
        refuse(match flaw {
            Flaw::Form => "model.sig is not an ed25519 signature (64 bytes, or 128 hexadecimal digits)",
            Flaw::Wrong => "model.sig does not sign this model.toml with the key this board trusts",
        })
    })
}

fn read_capped(path: &Path, bytes_max: u64) -> Result<Vec<u8>, PackageError> {
    let io = |source| PackageError::Io { doing: "read", path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > bytes_max {
        let text = format!("the file is longer than {bytes_max} bytes");
        return Err(io(std::io::Error::new(std::io::ErrorKind::FileTooLarge, text)));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
