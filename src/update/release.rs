//! What an update says about itself: `manifest.toml`, signed by its maker in `manifest.sig`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::infer::signature::{PrivateKey, hex};

/// Name of the manifest in an update's folder and in a slot.
pub const MANIFEST: &str = "manifest.toml";
/// Name of the signature over it: 64 bytes.
pub const SIGNATURE: &str = "manifest.sig";
/// Name of the firmware.
pub const BINARY: &str = "scanside";
/// Name of the folder of model packages.
pub const MODELS: &str = "models";
/// What the machine that runs this was built for.
pub const TARGET: &str = env!("SCANSIDE_TARGET");

const SCHEMA: &str = "scanside.update/1";

/// Files of one update; a few per model package. More would be no update of ours.
const FILES_MAX: usize = 512;

/// `major.minor.patch`, in the order in which releases follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version([u32; 3]);

impl Version {
    /// Reads `1.2.3`: three numbers and nothing else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|part| {
            let digits = (1..=9).contains(&part.len()) && part.bytes().all(|digit| digit.is_ascii_digit());
            part.parse().ok().filter(|_| digits)
        });
        let numbers = [parts.next()??, parts.next()??, parts.next()??];
        parts.next().is_none().then_some(Self(numbers))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [major, minor, patch] = self.0;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// The manifest of an update.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    schema: String,
    version: String,
    /// Rust's name of what the firmware is built for.
    pub target: String,
    /// Boards it is meant for.
    pub boards: Vec<String>,
    /// SHA-256 of every file, by its path in the update.
    pub files: BTreeMap<String, String>,
}

impl Release {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// One clause that says what is wrong.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(text).map_err(|_| format!("{MANIFEST} is not UTF-8"))?;
        let release: Self = toml::from_str(text).map_err(|e| format!("{MANIFEST}: {}", e.message()))?;
        release.check().map_err(|why| format!("{MANIFEST}: {why}"))?;
        Ok(release)
    }

    fn check(&self) -> Result<(), String> {
        if self.schema != SCHEMA {
            return Err(format!("schema {:?}, and this firmware reads {SCHEMA:?}", self.schema));
        }
        if Version::parse(&self.version).is_none() {
            return Err(format!("version {:?} is not three numbers with dots between", self.version));
        }
        if !self.files.contains_key(BINARY) {
            return Err(format!("files lists no {BINARY}"));
        }
        if self.files.len() > FILES_MAX {
            return Err(format!("{} files, and at most {FILES_MAX} are taken", self.files.len()));
        }
        for (path, digest) in &self.files {
            if !is_ours(path) {
                return Err(format!("files: {path:?} is neither {BINARY} nor a plain path below {MODELS}/"));
            }
            if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
                return Err(format!("files: {path}: not a SHA-256 of 64 lower-case hexadecimal digits"));
            }
        }
        Ok(())
    }

    /// Its version.
    pub fn version(&self) -> Version {
        Version::parse(&self.version).expect("checked when it was read")
    }

    /// Whether it is meant for this board and this machine.
    ///
    /// # Errors
    /// One clause that says for what it is meant.
    pub fn suits(&self, board: &str, target: &str) -> Result<(), String> {
        if self.target != target {
            return Err(format!("is built for {}, and this machine is {target}", self.target));
        }
        if !self.boards.iter().any(|name| name == board) {
            return Err(format!("is meant for {}, and this board is {board}", self.boards.join(", ")));
        }
        Ok(())
    }

    /// Makes an update of a folder that holds the firmware and its models: writes manifest and signature into it.
    ///
    /// # Errors
    /// One sentence.
    pub fn pack(folder: &Path, version: &str, target: &str, boards: &[String], key: &PrivateKey) -> Result<Self, String> {
        let mut files = BTreeMap::new();
        collect(folder, BINARY, &mut files)?;
        if folder.join(MODELS).is_dir() {
            collect(folder, MODELS, &mut files)?;
        }
        let (schema, version, target) = (SCHEMA.to_owned(), version.to_owned(), target.to_owned());
        let release = Self { schema, version, target, boards: boards.to_vec(), files };
        release.check()?;
        let text = toml::to_string(&release).map_err(|e| e.to_string())?;
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))
        };
        write(MANIFEST, text.as_bytes())?;
        write(SIGNATURE, &key.sign(text.as_bytes()))?;
        Ok(release)
    }
}

/// The firmware, or a path below the models that stays there whatever it is joined to.
fn is_ours(path: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && part.len() <= 64
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    let mut parts = path.split('/');
    path == BINARY || (parts.next() == Some(MODELS) && (2..=4).contains(&parts.clone().count()) && parts.all(plain))
}

fn collect(folder: &Path, name: &str, files: &mut BTreeMap<String, String>) -> Result<(), String> {
    let path = folder.join(name);
    let say = |e: std::io::Error| format!("cannot read {}: {e}", path.display());
    if !std::fs::metadata(&path).map_err(say)?.is_dir() {
        let bytes = std::fs::read(&path).map_err(say)?;
        files.insert(name.to_owned(), hex(&Sha256::digest(bytes)));
        return Ok(());
    }
    for entry in std::fs::read_dir(&path).map_err(say)? {
        let inner = entry.map_err(say)?.file_name().to_string_lossy().into_owned();
        collect(folder, &format!("{name}/{inner}"), files)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_follow_each_other_by_number_and_not_by_letter() {
        let v = |text| Version::parse(text);
        assert!(v("0.10.0") > v("0.9.9") && v("1.0.0") > v("0.99.99") && v("1.2.3") == v("1.2.3"));
        for odd in ["", "1", "1.2", "1.2.3.4", "1.2.+3", "1.2.3-rc1", "1..3", " 1.2.3", "1.2.9999999999"] {
            assert!(v(odd).is_none(), "{odd:?}");
        }
    }

    #[test]
    fn no_path_of_an_update_leaves_its_slot() {
        for good in ["scanside", "models/lung-seg/model.onnx", "models/lung-seg/golden/input.bin"] {
            assert!(is_ours(good), "{good}");
        }
        for bad in ["", "/etc/passwd", "models", "models/x", "models/../scanside/x", "models/./a/b", "models//a/b", "state.json",
            "manifest.toml", "a/b/c", "models/a/.hidden", "models/a b/c", "models/a/b/c/d/e"] {
            assert!(!is_ours(bad), "{bad}");
        }
    }
}
