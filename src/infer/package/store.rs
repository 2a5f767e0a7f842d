//! Where packages are kept: inside the binary, and in a folder of this box.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{MANIFEST, MANIFEST_BYTES_MAX, Network, Package, PackageError, SIGNATURE, Trust, read_capped};

/// The packages inside the binary: name, then `(path in the package, bytes)`.
type Embedded = &'static [(&'static str, &'static [(&'static str, &'static [u8])])];
include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The packages a box has: those in the binary, and those of a folder, which come first.
#[derive(Debug, Clone, Default)]
pub struct Models {
    dir: Option<PathBuf>,
    trust: Trust,
}

impl Models {
    /// Packages of `dir` where it has them, of the binary otherwise. Those in the binary need no signature: whoever
    /// trusts the binary trusts them. For a binary that was built without packages and told no folder, those of the folder
    /// `models` beside it.
    pub fn new(dir: Option<PathBuf>, trust: Trust) -> Self {
        let beside = || Some(std::env::current_exe().ok()?.parent()?.join("models"));
        Self { dir: if EMBEDDED.is_empty() { dir.or_else(beside) } else { dir }, trust }
    }

    /// Name and origin (`built in` or the folder) of every package, sorted by name.
    pub fn list(&self) -> Vec<(String, Option<PathBuf>)> {
        let mut all: BTreeMap<String, Option<PathBuf>> =
            EMBEDDED.iter().map(|(name, _)| ((*name).to_owned(), None)).collect();
        let entries = self.dir.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with('.') && entry.path().join(MANIFEST).is_file() {
                all.insert(name, Some(entry.path()));
            }
        }
        all.into_iter().collect()
    }

    /// Whether there is a package of this name.
    pub fn has(&self, name: &str) -> bool {
        self.list().iter().any(|(known, _)| known == name)
    }

    /// Reads and checks a package by name.
    ///
    /// # Errors
    /// [`PackageError`].
    pub fn package(&self, name: &str) -> Result<Package, PackageError> {
        let known = self.list();
        match known.iter().find(|(n, _)| n == name) {
            Some((_, Some(dir))) => Package::read(dir, &self.trust),
            Some((_, None)) => {
                let (_, files) = EMBEDDED.iter().find(|(n, _)| *n == name).expect("the list is made from it");
                Package::embedded(name, files)
            }
            None => Err(PackageError::Unknown {
                name: name.into(),
                known: known.into_iter().map(|(n, _)| n).collect(),
            }),
        }
    }

    /// Reads and checks a package by name, and makes its network. Of the package itself the manifest is kept: what was read from a
    /// folder is given back.
    ///
    /// # Errors
    /// [`PackageError`].
    pub fn network(&self, name: &str) -> Result<(Package, Network), PackageError> {
        let mut package = self.package(name)?;
        let network = package.network()?;
        package.files.retain(|_, bytes| matches!(bytes, Cow::Borrowed(_)));
        Ok((package, network))
    }
}

impl Package {
    /// Files in the folder that the manifest does not pin; a package to be trusted has none.
    ///
    /// # Errors
    /// [`PackageError::Io`] when the folder cannot be listed.
    pub fn unlisted(&self, dir: &Path) -> Result<Vec<String>, PackageError> {
        let mut found = Vec::new();
        list(dir, "", &mut found)?;
        found.retain(|f| f != MANIFEST && f != SIGNATURE && !self.files.contains_key(f));
        Ok(found)
    }

    /// Copies a checked package from `dir` into the models folder, whole or not at all, and says where it is now.
    ///
    /// # Errors
    /// As [`Package::read`], and [`PackageError::Io`] while writing.
    pub fn install(dir: &Path, models: &Path, trust: &Trust) -> Result<(Self, PathBuf), PackageError> {
        let package = Self::read(dir, trust)?;
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| PackageError::Io { doing: "write", path, source }
        };
        let target = models.join(&package.id.name);
        let staging = models.join(format!(".{}.new", package.id.name));
        let old = models.join(format!(".{}.old", package.id.name));
        let _ = fs::remove_dir_all(&staging);
        let _ = fs::remove_dir_all(&old);
        fs::create_dir_all(&staging).map_err(io(&staging))?;
        let beside = [MANIFEST, SIGNATURE].into_iter().filter(|name| dir.join(name).exists());
        for name in beside {
            let bytes = read_capped(&dir.join(name), MANIFEST_BYTES_MAX)?;
            fs::write(staging.join(name), bytes).map_err(io(&staging))?;
        }
        for (name, bytes) in package.files() {
            let path = staging.join(name);
            let parent = path.parent().expect("a file of the package lies in its folder");
            fs::create_dir_all(parent).map_err(io(parent))?;
            fs::write(&path, bytes).map_err(io(&path))?;
        }
        if target.exists() {
            fs::rename(&target, &old).map_err(io(&target))?;
        }
        fs::rename(&staging, &target).map_err(io(&target))?;
        let _ = fs::remove_dir_all(&old);
        Ok((package, target))
    }
}

fn list(dir: &Path, prefix: &str, into: &mut Vec<String>) -> Result<(), PackageError> {
    let io = |source| PackageError::Io { doing: "read", path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type().map_err(io)?.is_dir() {
            list(&entry.path(), &format!("{name}/"), into)?;
        } else {
            into.push(name);
        }
    }
    into.sort();
    Ok(())
}
