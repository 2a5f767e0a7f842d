//! What is handed out: a tar archive, a Debian package and a signed update for one board, the same to the byte whenever
//! and wherever they are made of the same binary.

mod archive;
mod deb;
pub mod debian;
pub mod root;
mod sbom;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use self::archive::{Entry, Tree};
use self::sbom::{Materials, hex};
use crate::board::{self, Board};
use crate::{Outcome, cross};

/// The second that everything in an archive is of: `SOURCE_DATE_EPOCH`, or that of the commit.
fn epoch(root: &Path) -> Result<u64, String> {
    if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
        return text.trim().parse().map_err(|_| format!("SOURCE_DATE_EPOCH is {text:?} and no number of seconds"));
    }
    let git = Command::new("git").current_dir(root).args(["log", "-1", "--format=%ct"]).output();
    let text = git.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    text.parse().map_err(|_| "no commit to take the time from: set SOURCE_DATE_EPOCH".to_owned())
}

/// What is made for a board.
struct Dist {
    version: String,
    tar_zst: Vec<u8>,
    deb: Vec<u8>,
}

/// Makes everything of a board that is made without a key.
fn make(root: &Path, board: &Board, binary: &[u8], mtime: u64, signed_by: Option<&str>) -> Result<Dist, String> {
    let target = &board.board.target;
    let materials = Materials::of(root, target)?;
    let mut tree = root::tree(root, board, binary, signed_by)?;
    let mut models = Vec::new();
    for (name, folder) in root::models(root)? {
        let manifest = std::fs::read(folder.join("model.toml")).map_err(|e| format!("models/{name}: {e}"))?;
        models.push((name, manifest));
    }
    let document = |name: &str| format!("usr/share/doc/scanside/{name}");
    for (name, file) in [("README.md", "README.md"), ("PROTOCOL.md", "board/PROTOCOL.md"), ("LICENSE-APACHE", "LICENSE-APACHE"), ("LICENSE-MIT", "LICENSE-MIT")] {
        tree.text(document(name), std::fs::read(root.join(file)).map_err(|e| format!("{file}: {e}"))?);
    }
    tree.text(document("copyright"), "scanside: MIT or Apache-2.0, at your option; its crates: licences.txt; its networks: models/*/model.toml.\n");
    tree.text(document("licences.txt"), materials.licences()?);
    tree.text(document("sbom.cdx.json"), materials.cyclonedx(target, binary, &models)?);
    tree.text(document("SHA256SUMS"), digests(&tree));
    let tar = tree.tar(mtime).map_err(|e| format!("tar: {e}"))?;
    let deb = deb::package(&tree, board, &materials.version, mtime)?;
    Ok(Dist { version: materials.version, tar_zst: archive::zstd(&tar)?, deb })
}

/// As `sha256sum` writes and `sha256sum --check` reads them, from the top of the tree.
fn digests(tree: &Tree) -> String {
    let files = tree.0.iter().filter_map(|(path, entry)| match entry {
        Entry::File { bytes, .. } => Some(format!("{}  {path}\n", hex(&Sha256::digest(bytes)))),
        Entry::Link(_) => None,
    });
    files.collect()
}

/// What to make, and of what.
pub struct Order<'o> {
    /// A file of board/, without .toml.
    pub board: &'o str,
    /// The firmware; built when there is none.
    pub binary: Option<PathBuf>,
    /// File of the private key that the update is signed with; without one there is no update.
    pub key: Option<PathBuf>,
    /// Where to.
    pub out: Option<PathBuf>,
}

/// Makes everything for one board below `target/package/<board>`.
pub fn run(root: &Path, order: &Order) -> Outcome {
    let board = board::parse(&board::expand(root, order.board)?)?;
    let path = match &order.binary {
        Some(path) => path.clone(),
        None => {
            let path = cross::build(root, &board.board.target)?;
            no_traces(root, &std::fs::read(&path)?)?;
            path
        }
    };
    let binary = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let out = order.out.clone().unwrap_or_else(|| root.join("target/package").join(order.board));
    std::fs::create_dir_all(&out)?;
    let mut signed_by = None;
    if let Some(key) = &order.key {
        signed_by = Some(update(root, &board, &binary, key, &out)?);
    }
    let dist = make(root, &board, &binary, epoch(root)?, signed_by.as_deref())?;
    let architecture = deb::architecture(&board.board.target)?;
    let named = [
        (format!("scanside-{}-{}.tar.zst", dist.version, order.board), &dist.tar_zst),
        (format!("scanside_{}_{architecture}_{}.deb", dist.version, order.board), &dist.deb),
    ];
    let mut sums = String::new();
    for (name, bytes) in named {
        std::fs::write(out.join(&name), bytes)?;
        let sum = format!("{}  {name}\n", hex(&Sha256::digest(bytes)));
        print!("{:>9} KiB  {sum}", bytes.len() / 1024);
        sums += &sum;
    }
    std::fs::write(out.join("SHA256SUMS"), sums)?;
    println!("in {}", out.display());
    Ok(())
}

/// The update's folder, as it is copied onto a stick; tells the public key.
fn update(root: &Path, board: &Board, binary: &[u8], key: &Path, out: &Path) -> Result<String, String> {
    let folder = out.join("scanside-update");
    let say = |e: std::io::Error| format!("{}: {e}", folder.display());
    let mut tree = Tree::default();
    for (name, models) in root::models(root)? {
        tree.add_folder(&models, &format!("models/{name}/")).map_err(say)?;
    }
    tree.program("scanside", binary.to_vec());
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(say)?;
    }
    for (path, entry) in &tree.0 {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap_or(&folder)).map_err(say)?;
        if let Entry::File { bytes, .. } = entry {
            std::fs::write(&path, bytes).map_err(say)?;
        }
    }
    // Whoever reads the manifest is the firmware, so the firmware writes it: one of this machine's.
    let mut pack = Command::new("cargo");
    pack.current_dir(root).args(["run", "--quiet", "--release", "--package", "scanside", "--", "update", "pack"]);
    pack.arg(&folder).args(["--board", &board.board.name, "--target", &board.board.target, "--json", "--key"]);
    let key = std::fs::canonicalize(key).map_err(|e| format!("{}: {e}", key.display()))?;
    let output = pack.arg(key).output().map_err(|e| format!("cargo: {e}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(|e| format!("update pack: {e}"))?;
    told["signed_by"].as_str().map(str::to_owned).ok_or_else(|| "update pack does not tell its key".into())
}

/// A binary that tells where it was built is another one on every machine.
fn no_traces(root: &Path, binary: &[u8]) -> Result<(), String> {
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.cargo")));
    for path in [Ok(root.display().to_string()), home].into_iter().flatten() {
        if binary.windows(path.len()).any(|window| window == path.as_bytes()) {
            return Err(format!("the binary holds the path {path} of this machine: it would be another one elsewhere"));
        }
    }
    Ok(())
}
