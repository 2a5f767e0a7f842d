//! What is in the firmware, and under which licences: a CycloneDX 1.5 bill of materials and the licence texts, made of what
//! cargo links for that target and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// One crate that is linked.
#[derive(Debug, Clone)]
pub struct Crate {
    name: String,
    version: String,
    licence: String,
    repository: Option<String>,
    checksum: Option<String>,
    folder: PathBuf,
    needs: BTreeSet<String>,
}

impl Crate {
    fn purl(&self) -> String {
        format!("pkg:cargo/{}@{}", self.name, self.version)
    }
}

/// The firmware's crates for a target.
#[derive(Debug)]
pub struct Materials {
    /// Version of the firmware.
    pub version: String,
    own: Crate,
    crates: Vec<Crate>,
}

fn cargo(root: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("cargo").current_dir(root).args(arguments).output().map_err(|e| format!("cargo: {e}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("cargo {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

impl Materials {
    /// Asks cargo what `scanside` links for `target`: neither build scripts nor macros nor tests.
    pub fn of(root: &Path, target: &str) -> Result<Self, String> {
        let tree = ["tree", "--locked", "--package", "scanside", "--edges", "normal,no-proc-macro", "--target", target,
            "--prefix", "none", "--no-dedupe", "--format", "{p}"];
        let linked: BTreeSet<(String, String)> = cargo(root, &tree)?
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                Some((words.next()?.to_owned(), words.next()?.trim_start_matches('v').to_owned()))
            })
            .collect();
        let metadata = cargo(root, &["metadata", "--format-version", "1", "--locked", "--filter-platform", target])?;
        let metadata: Value = serde_json::from_str(&metadata).map_err(|e| format!("cargo metadata: {e}"))?;
        let lock = std::fs::read_to_string(root.join("Cargo.lock")).map_err(|e| format!("Cargo.lock: {e}"))?;
        let lock: toml::Table = toml::from_str(&lock).map_err(|e| format!("Cargo.lock: {e}"))?;
        let word = |value: &Value, key: &str| value[key].as_str().map(str::to_owned);
        let checksums: BTreeMap<(String, String), String> = lock["package"].as_array().into_iter().flatten().filter_map(|package| {
            let word = |key: &str| package.get(key)?.as_str().map(str::to_owned);
            Some(((word("name")?, word("version")?), word("checksum")?))
        }).collect();
        let packages = metadata["packages"].as_array().ok_or("cargo metadata lists no packages")?;
        let mut by_id = BTreeMap::new();
        for package in packages {
            let (Some(id), Some(name), Some(version)) = (word(package, "id"), word(package, "name"), word(package, "version")) else {
                continue;
            };
            if !linked.contains(&(name.clone(), version.clone())) {
                continue;
            }
            let manifest = PathBuf::from(word(package, "manifest_path").unwrap_or_default());
            let checksum = checksums.get(&(name.clone(), version.clone())).cloned();
            // The old slash of crates.io means what SPDX calls OR.
            let licence = word(package, "license").unwrap_or_else(|| "LicenseRef-see-file".into()).replace('/', " OR ");
            let folder = manifest.parent().unwrap_or(root).to_owned();
            let repository = word(package, "repository");
            by_id.insert(id, Crate { name, version, licence, repository, checksum, folder, needs: BTreeSet::new() });
        }
        if by_id.len() != linked.len() {
            return Err(format!("cargo tree links {} crates, cargo metadata knows {} of them", linked.len(), by_id.len()));
        }
        for node in metadata["resolve"]["nodes"].as_array().into_iter().flatten() {
            let normal = |dep: &&Value| dep["dep_kinds"].as_array().into_iter().flatten().any(|kind| kind["kind"].is_null());
            let needed = node["deps"].as_array().into_iter().flatten().filter(normal).filter_map(|dep| word(dep, "pkg"));
            let needs: BTreeSet<String> = needed.filter_map(|id| by_id.get(&id).map(Crate::purl)).collect();
            if let Some(found) = word(node, "id").and_then(|id| by_id.get_mut(&id)) {
                found.needs = needs;
            }
        }
        let mut crates: Vec<Crate> = by_id.into_values().collect();
        crates.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
        let own = crates.iter().position(|c| c.name == "scanside").ok_or("cargo metadata does not know scanside")?;
        let own = crates.remove(own);
        Ok(Self { version: own.version.clone(), own, crates })
    }

    /// The bill of materials (CycloneDX 1.5, JSON): the firmware, its crates, its C library, its networks.
    pub fn cyclonedx(&self, target: &str, binary: &[u8], models: &[(String, Vec<u8>)]) -> Result<String, String> {
        let hash = |bytes: &[u8]| json!([{"alg": "SHA-256", "content": hex(&Sha256::digest(bytes))}]);
        let mut components = Vec::new();
        for c in &self.crates {
            let mut component = json!({"type": "library", "bom-ref": c.purl(), "name": c.name, "version": c.version,
                "purl": c.purl(), "licenses": [{"expression": c.licence}]});
            if let Some(checksum) = &c.checksum {
                component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
            }
            if let Some(url) = &c.repository {
                component["externalReferences"] = json!([{"type": "vcs", "url": url}]);
            }
            components.push(component);
        }
        components.push(json!({"type": "library", "bom-ref": "rust-std", "name": "Rust standard library",
            "licenses": [{"expression": "MIT OR Apache-2.0"}]}));
        if target.contains("-gnu") {
            components.push(json!({"type": "library", "bom-ref": "glibc", "name": "GNU C Library, linked statically",
                "licenses": [{"expression": "LGPL-2.1-or-later"}]}));
        }
        for (name, manifest) in models {
            let text = std::str::from_utf8(manifest).map_err(|e| format!("models/{name}: {e}"))?;
            let table: toml::Table = toml::from_str(text).map_err(|e| format!("models/{name}: {e}"))?;
            let word = |key: &str| table.get(key).and_then(toml::Value::as_str).unwrap_or_default().to_owned();
            components.push(json!({"type": "machine-learning-model", "bom-ref": format!("model:{name}"), "name": name,
                "version": word("version"), "description": word("summary"), "licenses": [{"expression": word("licence")}],
                "hashes": hash(manifest)}));
        }
        let own_ref = self.own.purl();
        let mut needs: BTreeSet<String> = self.own.needs.clone();
        let others = components.iter().filter_map(|c| c["bom-ref"].as_str()).filter(|name| !name.starts_with("pkg:"));
        needs.extend(others.map(str::to_owned));
        let mut dependencies = vec![json!({"ref": own_ref, "dependsOn": needs})];
        dependencies.extend(self.crates.iter().map(|c| json!({"ref": c.purl(), "dependsOn": c.needs})));
        let bom = json!({
            "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json", "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
            "metadata": {"component": {"type": "firmware", "bom-ref": own_ref, "name": "scanside", "version": self.version,
                "purl": own_ref, "licenses": [{"expression": self.own.licence}], "hashes": hash(binary),
                "properties": [{"name": "target", "value": target}]}},
            "components": components, "dependencies": dependencies,
        });
        serde_json::to_string_pretty(&bom).map(|text| text + "\n").map_err(|e| e.to_string())
    }

    /// Every licence text of every crate once, with the crates it is of.
    pub fn licences(&self) -> Result<String, String> {
        let mut text = String::from("The crates in scanside and their licences; the texts follow, each with the crates that carry it.\n\n");
        let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for c in &self.crates {
            let mut found = Vec::new();
            collect_licences(&c.folder, 0, &mut found).map_err(|e| format!("{} {}: {e}", c.name, c.version))?;
            let note = if found.is_empty() { "   (no text in the crate)" } else { "" };
            text += &format!("{:<40} {}{note}\n", format!("{} {}", c.name, c.version), c.licence);
            for licence in found {
                texts.entry(licence).or_default().push(format!("{} {}", c.name, c.version));
            }
        }
        text += "\nThe Rust standard library: MIT OR Apache-2.0. The GNU C Library, where it is linked statically: LGPL-2.1-or-later;\n\
                 its source is Debian's package glibc, and scanside's own source links with any other version of it.\n";
        for (licence, crates) in texts {
            text += &format!("\n{}\n{}\n\n{}\n", "=".repeat(100), crates.join(", "), licence.trim_end());
        }
        Ok(text)
    }
}

/// Licence files of a crate, those of C sources below it included.
fn collect_licences(folder: &Path, depth: usize, found: &mut Vec<String>) -> std::io::Result<()> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        let is_licence = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"].iter().any(|w| name.starts_with(w));
        if path.is_dir() && depth < 2 && !name.starts_with('.') {
            collect_licences(&path, depth + 1, found)?;
        } else if is_licence && path.is_file() {
            found.push(String::from_utf8_lossy(&std::fs::read(&path)?).replace('\r', ""));
        }
    }
    Ok(())
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
