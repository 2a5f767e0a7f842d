//! Puts every package under `models/` into the binary (feature `packages`): a new model is a new folder, and no code. And the
//! binary is told what it is built for, so that it takes no update for another machine.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("models");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=SCANSIDE_TARGET={}", env::var("TARGET").expect("set by cargo"));
    let mut code = String::from("static EMBEDDED: Embedded = &[\n");
    let mut packages = Vec::new();
    if env::var_os("CARGO_FEATURE_PACKAGES").is_some() {
        println!("cargo::rerun-if-changed=models");
        packages = sorted(&root)?;
    }
    for package in packages {
        if !package.join("model.toml").is_file() {
            continue;
        }
        println!("cargo::rerun-if-changed={}", package.display());
        let name = package.file_name().unwrap_or_default().to_string_lossy();
        let _ = writeln!(code, "    ({name:?}, &[");
        let mut files = Vec::new();
        collect(&package, &mut files)?;
        for file in files {
            let inside = file.strip_prefix(&package).expect("it was found there").to_string_lossy().into_owned();
            let _ = writeln!(code, "        ({inside:?}, include_bytes!({:?})),", file.display().to_string());
        }
        code.push_str("    ]),\n");
    }
    code.push_str("];\n");
    fs::write(PathBuf::from(env::var("OUT_DIR").expect("set by cargo")).join("embedded.rs"), code)
}

fn sorted(dir: &Path) -> io::Result<Vec<PathBuf>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}

fn collect(dir: &Path, into: &mut Vec<PathBuf>) -> io::Result<()> {
    for path in sorted(dir)? {
        if path.is_dir() {
            collect(&path, into)?;
        } else {
            into.push(path);
        }
    }
    Ok(())
}
