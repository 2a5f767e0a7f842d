//! The structure of `src`, held: which file may import which, and where the sharp tools may be used.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::Outcome;

/// The modules of the library in the order of the story; a file imports only from modules before its own.
const ORDER: &[&str] = &[
    "study", "geometry", "pool", "link", "volume", "dicom", "nifti", "nrrd", "series", "imaging", "infer", "finding", "exam",
    "phantom", "report", "ingest", "config", "update", "service",
];

/// Pairs that the order would allow and the design does not: who, whom, and why.
const APART: &[(&str, &str, &str)] = &[
    ("imaging", "dicom", "imaging knows no files"),
    ("imaging", "nifti", "imaging knows no files"),
    ("imaging", "link", "imaging knows no wires"),
    ("imaging", "series", "imaging knows no series"),
    ("infer", "dicom", "infer knows no medicine"),
    ("infer", "study", "infer knows no medicine"),
    ("infer", "series", "infer knows no medicine"),
    ("exam", "link", "exam knows no wires"),
    ("exam", "dicom", "exam knows no wires"),
    ("report", "infer", "report knows no networks"),
];

/// A word of the source, and the only places it may stand.
const CONFINED: &[(&str, &[&str])] = &[
    ("tract_onnx", &["src/infer/"]),
    ("memmap2", &["src/volume.rs", "src/volume/"]),
    ("dicom_core", &["src/dicom/"]),
    ("dicom_object", &["src/dicom/"]),
    ("dicom_ul", &["src/dicom/"]),
    ("dicom_pixeldata", &["src/dicom/"]),
    ("dicom_encoding", &["src/dicom/"]),
    ("dicom_dictionary_std", &["src/dicom/"]),
    ("dicom_transfer_syntax_registry", &["src/dicom/"]),
    ("unsafe", &["src/volume.rs", "src/volume/", "src/pool.rs", "src/infer/kernels/"]),
];

/// Checks the checkout and prints what is wrong with it.
pub fn run(root: &Path) -> Outcome {
    let faults = check(root)?;
    for fault in &faults {
        eprintln!("{fault}");
    }
    match faults.len() {
        0 => Ok(()),
        n => Err(format!("tidy: {n} faults").into()),
    }
}

/// Everything that is out of order, as `file: line: what`.
pub fn check(root: &Path) -> Result<Vec<String>, std::io::Error> {
    let mut files = Vec::new();
    collect(&root.join("src"), &mut files)?;
    files.sort();
    let mut faults = Vec::new();
    let mut declared = BTreeSet::from([root.join("src/lib.rs"), root.join("src/main.rs")]);
    for path in &files {
        let name = path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned();
        let text = std::fs::read_to_string(path)?;
        let in_library = !name.starts_with("src/cli/") && name != "src/main.rs" && name != "src/lib.rs";
        for (number, line) in text.lines().enumerate() {
            let code = code_of(line);
            let mut fault = |what: String| faults.push(format!("{name}:{}: {what}", number + 1));
            if in_library {
                for imported in imports(code) {
                    if let Some(what) = forbidden(module_of(&name), imported) {
                        fault(what);
                    }
                }
            }
            for (word, places) in CONFINED {
                if has_word(code, word) && !places.iter().any(|place| name.starts_with(place)) {
                    fault(format!("`{word}` belongs to {}", places.join(", ")));
                }
            }
            if let Some(module) = declared_module(code) {
                let folder = match path.file_name().and_then(|n| n.to_str()) {
                    Some("lib.rs" | "main.rs" | "mod.rs") => path.parent().unwrap_or(root).to_owned(),
                    _ => path.with_extension(""),
                };
                declared.insert(folder.join(format!("{module}.rs")));
                declared.insert(folder.join(module).join("mod.rs"));
            }
        }
    }
    for path in files.iter().filter(|path| !declared.contains(*path)) {
        faults.push(format!("{}: no module declares this file", path.strip_prefix(root).unwrap_or(path).display()));
    }
    Ok(faults)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), std::io::Error> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// The line without its comment and its string literals.
fn code_of(line: &str) -> &str {
    let line = line.trim_start();
    if line.starts_with("//") {
        return "";
    }
    line.split(" //").next().unwrap_or(line)
}

fn module_of(name: &str) -> &str {
    name.trim_start_matches("src/").split(['/', '.']).next().unwrap_or(name)
}

/// The top modules a line names after `crate::`.
fn imports(code: &str) -> impl Iterator<Item = &str> {
    code.split("crate::").skip(1).flat_map(|rest| {
        let rest = rest.strip_prefix('{').unwrap_or(rest);
        rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next()
    })
}

fn forbidden(module: &str, imported: &str) -> Option<String> {
    let rank = |name: &str| ORDER.iter().position(|m| *m == name);
    let (own, other) = (rank(module)?, rank(imported)?);
    if other > own {
        return Some(format!("`{module}` comes before `{imported}` and may not import it"));
    }
    APART.iter().find(|(who, whom, _)| *who == module && *whom == imported).map(|(_, _, why)| (*why).to_owned())
}

fn has_word(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '"');
        !part(before) && !part(after)
    })
}

fn declared_module(code: &str) -> Option<&str> {
    let code = code.strip_prefix("pub(crate) ").or_else(|| code.strip_prefix("pub(super) ")).unwrap_or(code);
    let code = code.strip_prefix("pub ").unwrap_or(code);
    code.strip_prefix("mod ")?.strip_suffix(';')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sources_are_in_order() {
        let faults = check(&crate::root()).unwrap();
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }

    #[test]
    fn what_is_out_of_order_is_found() {
        let root = std::env::temp_dir().join(format!("scanside-tidy-{}", std::process::id()));
        std::fs::create_dir_all(root.join("src/imaging")).unwrap();
        let write = |name: &str, text: &str| std::fs::write(root.join("src").join(name), text).unwrap();
        write("lib.rs", "pub mod study;\npub mod imaging;\n");
        write("main.rs", "fn main() {}\n");
        write("study.rs", "use crate::imaging::blur;\n// use crate::service in a comment is fine\n");
        write("imaging/mod.rs", "pub fn blur() { unsafe {} }\nuse crate::nifti::Reader;\n");
        write("imaging/lost.rs", "use memmap2::Mmap;\n");
        let faults = check(&root).unwrap();
        std::fs::remove_dir_all(&root).unwrap();
        let expected = [
            "src/imaging/lost.rs:1: `memmap2` belongs to src/volume.rs, src/volume/",
            "src/imaging/mod.rs:1: `unsafe` belongs to src/volume.rs, src/volume/, src/pool.rs, src/infer/kernels/",
            "src/imaging/mod.rs:2: imaging knows no files",
            "src/study.rs:1: `study` comes before `imaging` and may not import it",
            "src/imaging/lost.rs: no module declares this file",
        ];
        assert_eq!(faults, expected);
    }
}
