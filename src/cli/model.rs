//! `scanside model`: networks as files and packages.

mod packages;

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Subcommand;
use ndarray::{ArrayD, IxDyn};
use scanside::infer::engine::{Network, Step};
use scanside::infer::kernels::{Kernel, integer_peak};
use scanside::pool::Pool;
use sha2::{Digest, Sha256};

use super::{Failure, print};

/// Arguments of `scanside model`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lists the packages of this box: those in the binary and those of --models.
    List(packages::List),
    /// Shows what a package sees, says and comes from.
    Info(packages::Info),
    /// Checks a package on this machine: manifest, digests, signature, golden pair.
    Check(packages::Check),
    /// Checks a package and copies it into --models.
    Install(packages::Install),
    /// Makes a package of a MONAI bundle's metadata.json and an ONNX network.
    Import(packages::Import),
    /// Prints the nodule candidates of a chest CT with their features, to train a forest on.
    Features(packages::Features),
    /// Shows how a network would run here: its steps, kernels, multiply-adds and memory.
    Explain(Explain),
    /// Times a network on random input, and prints a hash of its output: the same on every machine.
    Bench(Bench),
}

#[derive(clap::Args)]
struct Explain {
    /// The network.
    file: PathBuf,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Bench {
    /// The network.
    file: PathBuf,
    /// Runs that are timed, after one that is not.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
    /// Threads to compute on.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Leave everything to tract: for comparison.
    #[arg(long)]
    tract: bool,
    /// Writes the outputs to this file, one after the other, as little-endian 32-bit floats.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// One JSON object instead of sentences.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::List(arguments) => packages::list(&arguments),
        Command::Info(arguments) => packages::info(&arguments),
        Command::Check(arguments) => packages::check(&arguments),
        Command::Install(arguments) => packages::install(&arguments),
        Command::Import(arguments) => packages::import(&arguments),
        Command::Features(arguments) => packages::features(&arguments),
        Command::Explain(arguments) => explain(&arguments),
        Command::Bench(arguments) => bench(&arguments),
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(file).map_err(|error| Failure::usage(format!("{}: {error}", file.display())))
}

fn load(file: &Path, kernel: Option<Kernel>) -> Result<Network, Failure> {
    Network::load_for(&read(file)?, kernel).map_err(|error| Failure::impossible(format!("{}: {error}", file.display())))
}

fn explain(arguments: &Explain) -> Result<(), Failure> {
    let network = load(&arguments.file, Some(Kernel::best()))?;
    let steps = network.explain();
    let macs: u64 = steps.iter().map(|step| step.macs).sum();
    if arguments.json {
        let json = serde_json::json!({
            "inputs": network.input_shapes(), "outputs": network.output_shapes(), "kernel": Kernel::best().name(),
            "arena_bytes": network.arena_bytes(), "weight_bytes": network.weight_bytes(), "macs": macs, "steps": steps,
            "kept": network.kept().iter().map(|(node, why)| serde_json::json!({"node": node, "why": why})).collect::<Vec<_>>(),
        });
        return print(&format!("{json}\n"));
    }
    let mut text = format!("{:<34} {:<16} {:<8} {:<20} {:<22} {:>10} {:>10}\n", "layer", "does", "runs in", "kernel", "shape", "MMAC", "KiB");
    for Step { name, operator, place, kernel, shape, macs, bytes } in &steps {
        let shape = shape.iter().map(ToString::to_string).collect::<Vec<_>>().join("x");
        let name: String = if name.chars().count() > 34 { name.chars().take(33).chain(['…']).collect() } else { name.clone() };
        let (mmac, kib) = (*macs as f64 / 1e6, *bytes as f64 / 1024.0);
        text += &format!("{name:<34} {operator:<16} {place:<8} {kernel:<20} {shape:<22} {mmac:>10.2} {kib:>10.1}\n");
    }
    text += &format!(
        "\n{:.3} GMAC in {} steps. Memory of a session: {:.1} MiB, planned before the first run; packed weights: {:.2} MiB.\n",
        macs as f64 / 1e9,
        steps.len(),
        network.arena_bytes() as f64 / 1048576.0,
        network.weight_bytes() as f64 / 1048576.0
    );
    if !network.kept().is_empty() {
        text += "\nLeft to tract though there are layers for such operators:\n";
        for (node, why) in network.kept() {
            text += &format!("  {node}: {why}\n");
        }
    }
    print(&text)
}

/// Element `index` of the random input: uniform in ±1.5, from SplitMix64 so that other programs can make the same.
fn random(index: u64) -> f32 {
    let mut z = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    ((z >> 40) as f32 / 16_777_216.0 - 0.5) * 3.0
}

fn cpu_ms() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 * 1e-6
}

/// The largest this process has been, in MiB; 0 where the system does not tell.
fn peak_rss_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

fn bench(arguments: &Bench) -> Result<(), Failure> {
    let kernel = Kernel::best();
    let network = load(&arguments.file, (!arguments.tract).then_some(kernel))?;
    let pool = Pool::new(arguments.threads);
    let mut counter = 0;
    let inputs: Vec<ArrayD<f32>> = network
        .input_shapes()
        .iter()
        .map(|shape| {
            ArrayD::from_shape_simple_fn(IxDyn(shape), || {
                counter += 1;
                random(counter - 1)
            })
        })
        .collect();
    let views: Vec<_> = inputs.iter().map(|input| input.view()).collect();
    let mut session = network.session().map_err(Failure::impossible)?;
    let mut outputs = session.run(&pool, &views).map_err(Failure::impossible)?;
    let (mut cpu, mut wall) = (Vec::new(), Vec::new());
    for _ in 0..arguments.runs {
        let (cpu_start, wall_start) = (cpu_ms(), Instant::now());
        session.run_into(&pool, &views, &mut outputs).map_err(Failure::impossible)?;
        cpu.push(cpu_ms() - cpu_start);
        wall.push(wall_start.elapsed().as_secs_f64() * 1e3);
    }
    let rss = peak_rss_mib();
    cpu.sort_by(f64::total_cmp);
    wall.sort_by(f64::total_cmp);
    let bytes: Vec<u8> = outputs.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    if let Some(file) = &arguments.output {
        std::fs::write(file, &bytes).map_err(|error| Failure::impossible(format!("{}: {error}", file.display())))?;
    }
    let macs: u64 = network.explain().iter().map(|step| step.macs).sum();
    let (median, least) = (cpu[cpu.len() / 2], cpu[0]);
    let rate = macs as f64 / least / 1e6;
    let peak = integer_peak(kernel);
    if arguments.json {
        let json = serde_json::json!({
            "file": arguments.file.display().to_string(), "kernel": if arguments.tract { "tract" } else { kernel.name() },
            "threads": pool.threads(), "runs": arguments.runs, "cpu_ms_median": median, "cpu_ms_min": least,
            "wall_ms_median": wall[wall.len() / 2], "wall_ms_min": wall[0], "peak_rss_mib": rss, "macs": macs,
            "gmac_per_s": rate, "peak_gmac_per_s": peak, "arena_bytes": network.arena_bytes(), "output_sha256": hash,
        });
        return print(&format!("{json}\n"));
    }
    print(&format!(
        "{:.2} ms of CPU (median of {}; least {:.2}), {:.2} ms of wall time on {} thread(s)\n\
         {:.3} GMAC, {:.1} GMAC/s per CPU second: {:.0} % of the {:.1} that a core's integer units do here ({})\n\
         peak memory of the process {:.1} MiB, of a session {:.1} MiB\noutput {hash}\n",
        median, arguments.runs, least, wall[wall.len() / 2], pool.threads(),
        macs as f64 / 1e9, rate, 100.0 * rate / peak, peak, kernel.name(),
        rss, network.arena_bytes() as f64 / 1048576.0,
    ))
}
