//! The installed tree of a board: `board/root/` as it stands, and what the board's own file makes of it.

use std::path::Path;

use super::archive::Tree;
use crate::board::{Board, Host, configuration};

/// Where the firmware lies; `/usr/bin/scanside` leads here.
pub const HOME: &str = "usr/lib/scanside";
/// The configuration file, which belongs to whoever runs the box.
pub const CONFIGURATION: &str = "etc/scanside/scanside.toml";

/// Everything but the firmware's own documents.
pub fn tree(root: &Path, board: &Board, binary: &[u8], signed_by: Option<&str>) -> Result<Tree, String> {
    let mut tree = Tree::default();
    let io = |e: std::io::Error| format!("board/root: {e}");
    tree.add_folder(&root.join("board/root"), "").map_err(io)?;
    tree.program(format!("{HOME}/scanside"), binary.to_vec());
    tree.link("usr/bin/scanside", "../lib/scanside/scanside");
    for (name, folder) in models(root)? {
        tree.add_folder(&folder, &format!("{HOME}/models/{name}/")).map_err(|e| format!("models/{name}: {e}"))?;
    }
    tree.text(CONFIGURATION, configuration(board, Host::Systemd, signed_by)?);
    tree.text("usr/lib/systemd/system/scanside.service.d/50-board.conf", limits(board));
    if !board.watchdog.device.is_empty() {
        tree.text("usr/lib/systemd/system.conf.d/50-scanside-watchdog.conf", watchdog(board));
    }
    Ok(tree)
}

/// Name and folder of every model package.
pub fn models(root: &Path) -> Result<Vec<(String, std::path::PathBuf)>, String> {
    let entries = std::fs::read_dir(root.join("models")).map_err(|e| format!("models: {e}"))?;
    let mut found: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.path().join("model.toml").is_file())
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .collect();
    found.sort();
    Ok(found)
}

/// The service's share of the board: a drop-in, so that the unit is the same everywhere.
fn limits(board: &Board) -> String {
    let service_mib = board.service_mib();
    let memory_mib = service_mib + board.memory.page_cache_mib;
    let cpus = match board.cores.inference.as_slice() {
        [] => format!("CPUQuota={}%\n", 100 * board.cores.count),
        cores => format!("AllowedCPUs={}\n", cores.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")),
    };
    format!(
        "# Made of board/{}.toml: {service_mib} MiB for the service, {} MiB of page cache for the series it reads.\n\
         [Service]\nMemoryMax={memory_mib}M\nMemorySwapMax=0\nTasksMax=256\n{cpus}",
        board.board.name, board.memory.page_cache_mib
    )
}

/// systemd feeds the board's watchdog, and the service says to systemd that it lives.
fn watchdog(board: &Board) -> String {
    let (device, timeout_s) = (&board.watchdog.device, board.watchdog.timeout_s);
    format!("# Made of board/{}.toml.\n[Manager]\nWatchdogDevice={device}\nRuntimeWatchdogSec={timeout_s}\n", board.board.name)
}
