//! `cargo xtask image`: kernel, initramfs and disk of a machine that boots straight into the service.
//!
//! ```text
//! kernel     Debian's, compressed
//! initramfs  busybox and the modules the disk needs
//! disk.img   1 root (ext4, mounted read-only: busybox, modules, settings, the factory's binary)
//!            2 slots of updates   3 spool
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::{Compression, write::GzEncoder};

use crate::board::{self, Board, Host};
use crate::dist::root::models;
use crate::{Made, Outcome, Unavailable, cross};

/// Kernel, initramfs and what the disk holds may not come to more: what fits beside a second one on 128 MiB of flash.
const IMAGE_BYTES_MAX: u64 = 64 << 20;

/// Modules by the moment they are loaded; what they depend on is found. ext4 asks for its checksum by name only.
const DISK_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];
const NETWORK_MODULES: &[&str] = &["virtio_net"];
const WATCHDOG_MODULES: &[&str] = &["i6300esb"];
const USB_MODULES: &[&str] = &["xhci-pci", "usb-storage", "sd_mod", "nls_cp437", "nls_ascii", "nls_utf8", "vfat"];

/// Room on the disk for the root and for two slots, MiB.
const ROOT_MIB: u64 = 48;
const SLOTS_MIB: u64 = 128;

const SECTOR: u64 = 512;

/// A machine's files.
pub struct Image {
    /// Gzipped.
    pub kernel: PathBuf,
    /// cpio, gzipped.
    pub initramfs: PathBuf,
    /// Sparse, with an MBR.
    pub disk: PathBuf,
    /// The static binary that is in it.
    pub binary: PathBuf,
    /// Its size.
    pub binary_bytes: u64,
    /// Bytes of all three that are not holes.
    pub bytes: u64,
}

/// Makes the image of a board; `signed_by` is the key its updates must be signed with.
pub fn build(root: &Path, name: &str, signed_by: Option<&str>) -> Made<Image> {
    let board = board::parse(&board::expand(root, name)?)?;
    if !board.kernel.features.iter().any(|feature| feature == "VIRTIO_BLK") {
        return Err(format!("{name}: an image is made for qemu-virt alone; other boards take `cargo xtask dist`").into());
    }
    let binary = cross::build(root, &board.board.target)?;
    let debian = debian(root)?;
    let folder = root.join("target/image").join(name);
    let _ = fs::remove_dir_all(&folder);
    let tree = folder.join("root");
    fs::create_dir_all(&tree)?;

    let kernel = folder.join("kernel");
    let mut gzip = GzEncoder::new(File::create(&kernel)?, Compression::new(6));
    gzip.write_all(&fs::read(&debian.kernel)?)?;
    gzip.finish()?;

    let early = debian.modules.ordered(DISK_MODULES, &BTreeSet::new())?;
    let initramfs = folder.join("initramfs");
    make_initramfs(root, &debian, &early, &initramfs)?;

    make_root(root, &board, signed_by, &debian, &early, &binary, &tree)?;
    let disk = folder.join("disk.img");
    make_disk(&tree, &board, &folder, &disk)?;

    let binary_bytes = fs::metadata(&binary)?.len();
    let bytes = stored(&kernel)? + stored(&initramfs)? + stored(&disk)?;
    Ok(Image { kernel, initramfs, disk, binary, binary_bytes, bytes })
}

/// Makes the image and holds its size against the budget.
pub fn image(root: &Path, name: &str) -> Outcome {
    let image = build(root, name, None)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    for part in [&image.kernel, &image.initramfs, &image.disk] {
        println!("{:>7.1} MiB  {}", mib(stored(part)?), part.display());
    }
    image.hold()
}

impl Image {
    /// Holds the size against the budget.
    pub fn hold(&self) -> Outcome {
        println!("{:>7.1} MiB in all (at most {})", self.bytes as f64 / f64::from(1 << 20), IMAGE_BYTES_MAX >> 20);
        if self.bytes > IMAGE_BYTES_MAX {
            return Err(format!("the image has {} bytes, the budget is {IMAGE_BYTES_MAX}", self.bytes).into());
        }
        Ok(())
    }
}

/// Bytes on disk, without holes.
fn stored(path: &Path) -> Made<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// What Debian gives: kernel, modules, busybox.
pub struct Debian {
    pub kernel: PathBuf,
    pub busybox: PathBuf,
    modules: Modules,
}

/// The folder of Debian's kernel and busybox, downloaded once.
pub fn fetch(root: &Path) -> Made<PathBuf> {
    let folder = root.join("target/qemu");
    let unpacked = folder.join("unpacked");
    if unpacked.is_dir() {
        return Ok(unpacked);
    }
    let depends = Command::new("apt-cache").args(["depends", "linux-image-arm64:arm64"]).output()?;
    let text = String::from_utf8_lossy(&depends.stdout).into_owned();
    let kernel = text.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let kernel = kernel.ok_or("apt knows no kernel for arm64; `cargo xtask setup` adds the architecture")?;
    let kernel = format!("linux-image-{}:arm64", kernel.trim_end_matches(":arm64"));
    let (packages, fresh) = (folder.join("deb"), folder.join("unpacking"));
    for old in [&packages, &fresh] {
        let _ = fs::remove_dir_all(old);
        fs::create_dir_all(old)?;
    }
    run(Command::new("apt-get").args(["download", "-qq", "-o", "Acquire::Retries=3", &kernel, "busybox-static:arm64"]).current_dir(&packages))
        .map_err(|e| Unavailable(e.to_string()))?;
    for package in fs::read_dir(&packages)? {
        run(Command::new("dpkg").arg("-x").arg(package?.path()).arg(&fresh))?;
    }
    fs::rename(&fresh, &unpacked)?;
    Ok(unpacked)
}

pub fn debian(root: &Path) -> Made<Debian> {
    let folder = fetch(root)?;
    let only = |folder: PathBuf, prefix: &str| -> Made<PathBuf> {
        let entries = fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let mut found = entries.filter_map(|e| Some(e.ok()?.path()));
        let named = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix));
        found.find(named).ok_or_else(|| format!("{}: no {prefix}…", folder.display()).into())
    };
    Ok(Debian {
        kernel: only(folder.join("boot"), "vmlinuz-")?,
        busybox: folder.join("bin/busybox"),
        modules: Modules::below(&only(folder.join("lib/modules"), "")?)?,
    })
}

/// The kernel's modules, by name.
struct Modules(Vec<PathBuf>);

impl Modules {
    fn below(folder: &Path) -> Made<Self> {
        let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "ko") {
                    files.push(path);
                }
            }
        }
        Ok(Self(files))
    }

    fn file(&self, name: &str) -> Made<&Path> {
        let same = |path: &&PathBuf| path.file_stem().is_some_and(|s| s.to_string_lossy().replace('-', "_") == name.replace('-', "_"));
        self.0.iter().find(same).map(PathBuf::as_path).ok_or_else(|| format!("the kernel has no module {name}").into())
    }

    /// The modules and all they depend on, those first, without what is `loaded` already.
    fn ordered(&self, wanted: &[&str], loaded: &BTreeSet<PathBuf>) -> Made<Vec<PathBuf>> {
        let mut order = Vec::new();
        for name in wanted {
            self.add(name, loaded, &mut order)?;
        }
        Ok(order)
    }

    fn add(&self, name: &str, loaded: &BTreeSet<PathBuf>, order: &mut Vec<PathBuf>) -> Outcome {
        let file = self.file(name)?.to_owned();
        if loaded.contains(&file) || order.contains(&file) {
            return Ok(());
        }
        for needed in depends(&fs::read(&file)?) {
            self.add(&needed, loaded, order)?;
        }
        order.push(file);
        Ok(())
    }
}

/// `depends=` of a module's information: strings that end in a zero byte.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else { return Vec::new() };
    let value = module[at + key.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn list(modules: &[PathBuf]) -> String {
    modules.iter().map(|module| stem(module) + "\n").collect()
}

/// A cpio archive ("newc") is a run of headers in hexadecimal, names and bytes, each filled up to four.
pub struct Cpio<W> {
    out: W,
    entries: u32,
    at: usize,
}

impl<W: Write> Cpio<W> {
    /// An archive without entries.
    pub fn new(out: W) -> Self {
        Self { out, entries: 0, at: 0 }
    }

    /// Ends the archive.
    pub fn end(mut self) -> Made<W> {
        self.add("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.out)
    }

    /// Adds a file, a folder or a device.
    pub fn add(&mut self, name: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> Outcome {
        self.entries += 1;
        let name_bytes = name.len() + 1;
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            self.entries, 0, 0, 1, 0, bytes.len(), 0, 0, device.0, device.1, name_bytes, 0
        );
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(b"\0")?;
        self.fill()?;
        self.put(bytes)?;
        self.fill()
    }

    fn put(&mut self, bytes: &[u8]) -> Outcome {
        self.at += bytes.len();
        Ok(self.out.write_all(bytes)?)
    }

    fn fill(&mut self) -> Outcome {
        self.put(&[0; 3][..self.at.next_multiple_of(4) - self.at])
    }
}

pub const FOLDER: u32 = 0o040_755;
pub const PROGRAM: u32 = 0o100_755;
pub const FILE: u32 = 0o100_644;
pub const TERMINAL: u32 = 0o020_600;

fn make_initramfs(root: &Path, debian: &Debian, early: &[PathBuf], out: &Path) -> Outcome {
    let gzip = GzEncoder::new(File::create(out)?, Compression::new(6));
    let mut cpio = Cpio::new(gzip);
    for folder in ["bin", "dev", "proc", "root", "lib", "lib/modules"] {
        cpio.add(folder, FOLDER, (0, 0), &[])?;
    }
    cpio.add("dev/console", TERMINAL, (5, 1), &[])?;
    cpio.add("init", PROGRAM, (0, 0), &fs::read(root.join("board/image/initramfs"))?)?;
    cpio.add("bin/busybox", PROGRAM, (0, 0), &fs::read(&debian.busybox)?)?;
    cpio.add("modules", FILE, (0, 0), list(early).as_bytes())?;
    for module in early {
        cpio.add(&format!("lib/modules/{}.ko", stem(module)), FILE, (0, 0), &fs::read(module)?)?;
    }
    cpio.end()?.finish()?;
    Ok(())
}

fn make_root(
    root: &Path,
    board: &Board,
    signed_by: Option<&str>,
    debian: &Debian,
    early: &[PathBuf],
    binary: &Path,
    tree: &Path,
) -> Outcome {
    for folder in ["bin", "sbin", "dev", "proc", "sys", "run", "tmp", "data", "etc/scanside", "lib/modules", "usr/lib/scanside", "var/lib/scanside"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    fs::copy(&debian.busybox, tree.join("bin/busybox"))?;
    fs::copy(root.join("board/image/init"), tree.join("sbin/init"))?;
    fs::copy(binary, tree.join("usr/lib/scanside/scanside"))?;
    for (name, folder) in models(root)? {
        copy_folder(&folder, &tree.join("usr/lib/scanside/models").join(name))?;
    }
    for program in ["bin/busybox", "sbin/init", "usr/lib/scanside/scanside"] {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(tree.join(program), fs::Permissions::from_mode(0o755))?;
    }
    let mut loaded: BTreeSet<PathBuf> = early.iter().cloned().collect();
    for (name, wanted) in [("network", NETWORK_MODULES), ("watchdog", WATCHDOG_MODULES), ("usb", USB_MODULES)] {
        let modules = debian.modules.ordered(wanted, &loaded)?;
        for module in &modules {
            fs::copy(module, tree.join("lib/modules").join(format!("{}.ko", stem(module))))?;
        }
        fs::write(tree.join("lib/modules").join(name), list(&modules))?;
        loaded.extend(modules);
    }
    fs::write(tree.join("etc/scanside/scanside.toml"), board::configuration(board, Host::Image, signed_by)?)?;
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Outcome {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        if path.is_dir() {
            copy_folder(&path, &to.join(name))?;
        } else {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

/// Three file systems behind one partition table.
fn make_disk(tree: &Path, board: &Board, folder: &Path, disk: &Path) -> Outcome {
    let parts = [
        // Nothing is ever written there, so it needs no journal and no room for root's.
        ("root", ROOT_MIB, vec!["-O", "^has_journal", "-m", "0", "-d", tree.to_str().ok_or("a path that is not UTF-8")?]),
        ("slots", SLOTS_MIB, vec!["-J", "size=4", "-m", "0"]),
        ("spool", board.spool.mib, vec!["-J", "size=16", "-m", "0"]),
    ];
    let mut out = File::create(disk)?;
    let (mut start, mut table) = (1 << 20, Vec::new());
    for (label, mib, options) in &parts {
        let file = folder.join(label).with_extension("ext4");
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.env("PATH", path_with_sbin()).args(["-q", "-q", "-F", "-t", "ext4", "-L", label, "-E", "lazy_itable_init=1"]).args(options);
        run(mke2fs.arg(&file).arg(format!("{mib}M")))?;
        copy_sparse(&mut File::open(&file)?, &mut out, start)?;
        fs::remove_file(&file)?;
        table.push((start / SECTOR, (mib << 20) / SECTOR));
        start += mib << 20;
    }
    out.set_len(start)?;
    out.seek(SeekFrom::Start(0))?;
    out.write_all(&partition_table(&table))?;
    Ok(())
}

/// mke2fs lies where a user's PATH often does not lead.
fn path_with_sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Copies what is not zero to `start`; holes stay holes.
fn copy_sparse(from: &mut File, to: &mut File, start: u64) -> Outcome {
    let (mut block, mut at) = (vec![0; 64 << 10], start);
    loop {
        let got = from.read(&mut block)?;
        if got == 0 {
            return Ok(());
        }
        for (n, page) in block[..got].chunks(4096).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                to.seek(SeekFrom::Start(at + n as u64 * 4096))?;
                to.write_all(page)?;
            }
        }
        at += got as u64;
    }
}

/// The first sector of a disk with primary partitions, each `(first sector, sectors)`.
fn partition_table(parts: &[(u64, u64)]) -> [u8; SECTOR as usize] {
    let mut sector = [0; SECTOR as usize];
    for ((first, sectors), entry) in parts.iter().zip(sector[446..510].chunks_exact_mut(16)) {
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&(*first as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&(*sectors as u32).to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xAA]);
    sector
}

/// Runs a program whose failure ends the task.
pub fn run(command: &mut Command) -> Outcome {
    let status = command.status().map_err(|e| format!("{}: {e}; `cargo xtask setup` installs it", command.get_program().display()))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_depends_on_is_read_from_its_information() {
        assert_eq!(depends(b"\x7fELF..\0license=GPL\0depends=jbd2,mbcache,crc16\0intree=Y\0"), ["jbd2", "mbcache", "crc16"]);
        assert!(depends(b"..\0depends=\0name=crc16\0").is_empty());
        assert!(depends(b"no information").is_empty());
    }

    #[test]
    fn an_archive_entry_is_filled_up_to_four_bytes() {
        let mut cpio = Cpio { out: Vec::new(), entries: 0, at: 0 };
        cpio.add("init", PROGRAM, (0, 0), b"12345").unwrap();
        assert_eq!(cpio.out.len(), (110_usize + 5).next_multiple_of(4) + 8);
        assert!(cpio.out.starts_with(b"07070100000001000081ed"));
        assert_eq!(&cpio.out[116..121], b"12345");
    }

    #[test]
    fn a_partition_begins_where_the_table_says() {
        let sector = partition_table(&[(2048, 98_304), (100_352, 262_144)]);
        assert_eq!(sector[510..], [0x55, 0xAA]);
        assert_eq!(sector[446 + 4], 0x83);
        assert_eq!(sector[446 + 16 + 8..446 + 16 + 12], 100_352_u32.to_le_bytes());
    }
}
