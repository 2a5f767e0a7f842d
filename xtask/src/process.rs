//! What proc(5) says of a process.

use std::fs;
use std::fmt::Display;

/// A size of `status`, such as VmHWM, in MiB; None when the process is gone.
pub fn memory_mib(process: impl Display, name: &str) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let size = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(size.trim().trim_end_matches(" kB").trim().parse::<f64>().ok()? / 1024.0)
}

/// Seconds on a processor, user and system; with those of the children it has waited for.
pub fn cpu_s(process: impl Display, with_children: bool) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field may hold spaces; utime, stime, cutime and cstime are the 12th to the 15th after it, in ticks of 10 ms.
    let ticks = stat.rsplit_once(") ")?.1.split_whitespace().skip(11).take(if with_children { 4 } else { 2 });
    Some(ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0)
}
