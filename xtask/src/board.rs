//! Board files: a board is a short TOML file that inherits, and what it comes to.

use std::path::Path;

use serde::Deserialize;

/// One board, expanded.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Board {
    /// `[board]`
    pub board: Identity,
    /// `[cores]`
    pub cores: Cores,
    /// `[memory]`
    pub memory: Memory,
    /// `[study]`
    pub study: Study,
    /// `[spool]`
    pub spool: Spool,
    /// `[serial]`
    pub serial: Serial,
    /// `[watchdog]`
    pub watchdog: Watchdog,
    /// `[kernel]`
    pub kernel: Kernel,
    /// `[update]`
    pub update: Update,
    /// Laid over the service's defaults; checked by the service's own reader.
    pub service: toml::Table,
}

impl Board {
    /// What the service may use, MiB.
    pub fn service_mib(&self) -> u64 {
        self.service_number("memory", "budget_mib", 768)
    }

    fn service_number(&self, section: &str, key: &str, default: u64) -> u64 {
        let value = self.service.get(section).and_then(|table| table.get(key));
        value.and_then(toml::Value::as_integer).map_or(default, |v| v.max(0) as u64)
    }
}

/// What it is.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The file's name without `.toml`.
    pub name: String,
    /// One line for people.
    pub description: String,
    /// `tested`, `built` or `described`.
    pub tier: Tier,
    /// Rust's name of the target.
    pub target: String,
}

/// How far a board is supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Booted on every submission.
    Tested,
    /// Cross-built on every submission.
    Built,
    /// Neither.
    Described,
}

/// Its processors.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cores {
    /// How many.
    pub count: usize,
    /// Those the worker threads run on; empty: all.
    pub inference: Vec<usize>,
}

/// Its memory, MiB.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Fitted.
    pub board_mib: u64,
    /// Kernel and everything that is not the service.
    pub system_mib: u64,
    /// For the page cache of the series that is read.
    pub page_cache_mib: u64,
}

/// The largest study it takes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// Slices.
    pub slices: u64,
    /// Rows of a slice.
    pub rows: u64,
    /// Columns of a slice.
    pub columns: u64,
}

/// Where the spool lies.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spool {
    /// Block device.
    pub device: String,
    /// Its size.
    pub mib: u64,
}

/// Serial ports in the order they are tried.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// May be none.
    pub ports: Vec<SerialPort>,
}

/// One port.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialPort {
    /// `/dev/tty…`
    pub device: String,
    /// Bits a second.
    pub baud: u32,
}

/// The hardware watchdog.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watchdog {
    /// `/dev/watchdog`; empty: there is none.
    pub device: String,
    /// Seconds until it bites.
    pub timeout_s: u64,
}

/// Updates of the image; a package is replaced by Debian's means.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// Folder of the two slots.
    pub slots: String,
}

/// What the kernel must have.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Names without `CONFIG_`.
    pub features: Vec<String>,
}

/// Reads `board/<name>.toml` and what it inherits, as a table.
pub fn expand(root: &Path, name: &str) -> Result<toml::Table, String> {
    let table = read(root, &format!("{name}.toml"))?;
    match parse(&table) {
        Ok(board) => check(name, &board).map(|()| table),
        Err(error) => Err(format!("board/{name}.toml: {error}")),
    }
}

/// The table as a [`Board`].
pub fn parse(table: &toml::Table) -> Result<Board, String> {
    Board::deserialize(table.clone()).map_err(|e| e.to_string().trim_end().replace('\n', " "))
}

/// Who starts the service on a board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// The image's own init: slots of its own, and the service feeds the hardware watchdog itself.
    Image,
    /// systemd, on a Debian: dpkg replaces the files, and systemd feeds the hardware watchdog.
    Systemd,
}

/// The service's configuration file for a board. `signed_by` is the public key that its updates are signed with.
pub fn configuration(board: &Board, host: Host, signed_by: Option<&str>) -> Result<String, String> {
    let mut table = board.service.clone();
    let mut update = toml::Table::from_iter([("board".to_owned(), board.board.name.clone().into())]);
    if host == Host::Image {
        update.insert("slots".into(), board.update.slots.clone().into());
    }
    if host == Host::Image && !board.watchdog.device.is_empty() {
        let timeout_s = toml::Value::Integer(board.watchdog.timeout_s as i64);
        let watchdog = [("device".to_owned(), board.watchdog.device.clone().into()), ("timeout_s".to_owned(), timeout_s)];
        table.insert("watchdog".into(), toml::Table::from_iter(watchdog).into());
    }
    update.extend(signed_by.map(|key| ("signed_by".to_owned(), key.into())));
    table.insert("update".into(), update.into());
    let text = toml::to_string(&table).map_err(|e| e.to_string())?;
    let name = &board.board.name;
    Ok(format!("# {}.\n# Made of board/{name}.toml; `scanside config print` shows every setting in force.\n\n{text}", board.board.description))
}

/// `name  tier  description`, for a list.
pub fn summary(root: &Path, name: &str) -> Result<String, String> {
    let Identity { name, description, tier, .. } = parse(&expand(root, name)?)?.board;
    let tier = format!("{tier:?}").to_lowercase();
    Ok(format!("{name:<18} {tier:<10} {description}"))
}

/// Names of all boards.
pub fn names(root: &Path) -> Result<Vec<String>, std::io::Error> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root.join("board"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "toml") && path.file_stem().is_some_and(|s| s != "base") {
            names.extend(path.file_stem().map(|s| s.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

fn read(root: &Path, file: &str) -> Result<toml::Table, String> {
    let path = root.join("board").join(file);
    let text = std::fs::read_to_string(&path).map_err(|e| format!("board/{file}: {e}"))?;
    let mut table: toml::Table = toml::from_str(&text).map_err(|e| format!("board/{file}: {e}"))?;
    match table.remove("inherits") {
        None => Ok(table),
        Some(toml::Value::String(base)) if base != file && base == "base.toml" => {
            let mut whole = read(root, &base)?;
            overlay(&mut whole, table);
            Ok(whole)
        }
        Some(other) => Err(format!("board/{file}: inherits {other}, and boards inherit from base.toml alone")),
    }
}

fn overlay(base: &mut toml::Table, own: toml::Table) {
    for (key, value) in own {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(value)) => overlay(inner, value),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// Whether the numbers of a board add up for its largest study.
fn check(name: &str, board: &Board) -> Result<(), String> {
    let wrong = |what: String| Err(format!("board/{name}.toml: {what}"));
    if board.board.name != name {
        return wrong(format!("board.name is {:?}", board.board.name));
    }
    if let Some(core) = board.cores.inference.iter().find(|core| **core >= board.cores.count) {
        return wrong(format!("cores.inference names core {core} of {}", board.cores.count));
    }
    let service_mib = board.service_mib();
    let needed_mib = service_mib + board.memory.system_mib + board.memory.page_cache_mib;
    if needed_mib > board.memory.board_mib {
        return wrong(format!(
            "the memory does not add up: service {service_mib} + system {} + page cache {} = {needed_mib} MiB of {}",
            board.memory.system_mib, board.memory.page_cache_mib, board.memory.board_mib
        ));
    }
    // Every slice lies in the spool twice while its series grows: as the instance received, and in the volume.
    let study_mib = (board.study.slices * board.study.rows * board.study.columns * 2 * 2).div_ceil(1 << 20);
    let spool_mib = board.service_number("spool", "mib_max", 8192);
    if study_mib > spool_mib {
        return wrong(format!("the largest study needs {study_mib} MiB of spool, service.spool.mib_max is {spool_mib}"));
    }
    if spool_mib > board.spool.mib {
        return wrong(format!("service.spool.mib_max {spool_mib} is more than the device's {} MiB", board.spool.mib));
    }
    let address_mib = if board.board.target.starts_with("armv7") { 2048 } else { u64::MAX };
    if study_mib / 2 > address_mib / 2 {
        return wrong(format!("a volume of {} MiB cannot be mapped in 32 bits", study_mib / 2));
    }
    if !(1..=300).contains(&board.watchdog.timeout_s) {
        return wrong("watchdog.timeout_s: 1 to 300".into());
    }
    let watchdog = Some(&board.watchdog.device).filter(|device| !device.is_empty());
    let devices = board.serial.ports.iter().map(|port| &port.device).chain(watchdog).chain([&board.spool.device]);
    if let Some(odd) = devices.into_iter().find(|device| !device.starts_with("/dev/")) {
        return wrong(format!("{odd} is no device"));
    }
    if let Some(port) = board.serial.ports.iter().find(|port| !(9600..=4_000_000).contains(&port.baud)) {
        return wrong(format!("{}: {} bits a second", port.device, port.baud));
    }
    if let Some(odd) = board.kernel.features.iter().find(|name| name.is_empty() || name.starts_with("CONFIG_")) {
        return wrong(format!("kernel.features: {odd:?} (names stand without CONFIG_)"));
    }
    let service_serial = board.service.get("serial").and_then(|t| t.get("device")).and_then(|d| d.as_str());
    if let Some(device) = service_serial
        && !board.serial.ports.iter().any(|port| port.device == device)
    {
        return wrong(format!("service.serial.device {device} is none of serial.ports"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use scanside::config::Settings;
    use scanside::service::Service;

    use super::*;

    #[test]
    fn every_boards_budget_adds_up_for_its_largest_study() {
        let root = crate::root();
        let names = names(&root).unwrap();
        assert!(names.len() >= 8, "{names:?}");
        for name in names {
            expand(&root, &name).unwrap();
        }
    }

    #[test]
    fn the_service_keeps_within_the_memory_of_every_board() {
        let root = crate::root();
        for name in names(&root).unwrap() {
            let board = parse(&expand(&root, &name).unwrap()).unwrap();
            let mut table: toml::Table = configuration(&board, Host::Image, None).unwrap().parse().unwrap();
            // The places are this machine's, the numbers the board's.
            let folder = tempfile::tempdir().unwrap();
            let places = [("spool", folder.path().join("spool")), ("inbox", folder.path().join("inbox")), ("socket", folder.path().join("socket"))];
            for (section, path) in places.into_iter().chain([("models", root.join("models"))]) {
                table[section]["path"] = path.display().to_string().into();
            }
            table["dicom"]["listen"] = "127.0.0.1:0".into();
            table.remove("serial");
            table.remove("watchdog");
            let file = folder.path().join("scanside.toml");
            std::fs::write(&file, toml::to_string(&table).unwrap()).unwrap();
            let service = Service::start(Settings::load(&file).unwrap()).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(service.status().memory_budget_mib, board.service_mib(), "{name}");
            assert!((256..=board.service_mib()).contains(&service.memory_plan().total_mib()), "{name}");
            service.stop();
        }
    }

    #[test]
    fn a_key_nobody_knows_and_a_budget_too_large_are_named() {
        let table = expand(&crate::root(), "sim").unwrap();
        let mut odd = table.clone();
        odd.insert("colour".into(), "red".into());
        assert!(parse(&odd).unwrap_err().contains("colour"));
        let mut board = parse(&table).unwrap();
        board.memory.board_mib = 600;
        let error = check("sim", &board).unwrap_err();
        assert_eq!(
            error,
            "board/sim.toml: the memory does not add up: service 576 + system 192 + page cache 256 = 1024 MiB of 600"
        );
    }
}
