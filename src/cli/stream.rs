//! `scanside send --fps`: the frames of a cine as a live stream over the local socket.

use std::path::Path;
use std::time::{Duration, Instant};

use scanside::dicom::Instance;
use scanside::dicom::client::find_files;
use scanside::exam::ultrasound::ClipHeader;
use scanside::ingest::socket::{Client, ClientError, FrameHeader, Pixel};
use scanside::series::{FrameRecord, Planar};
use serde_json::json;

use super::{Failure, print};

/// Sends every frame of the files below `path`, `fps` a second, the whole `repeat` times, and says how it went.
///
/// # Errors
/// A file that cannot be read, and a service that goes away. A frame that is refused is counted, and the stream goes on.
pub fn send_live(socket: &Path, path: &Path, fps: f64, repeat: usize, as_json: bool) -> Result<(), Failure> {
    let cannot = |path: &Path, e: &dyn std::fmt::Display| Failure::Impossible(format!("{}: {e}", path.display()));
    let (files, _) = find_files(path).map_err(|e| cannot(path, &e))?;
    if files.is_empty() {
        return Err(cannot(path, &"no DICOM file in it"));
    }
    let mut client = Client::connect(socket, "scanside send --fps").map_err(Failure::impossible)?;
    let step = Duration::from_secs_f64(1.0 / fps);
    let (begun, mut sent, mut refused) = (Instant::now(), 0u64, 0u64);
    let mut first_refusal = None;
    for _ in 0..repeat {
        for (file, _) in &files {
            let bytes = std::fs::read(file).map_err(|e| cannot(file, &e))?;
            let instance = Instance::parse(&bytes).map_err(|e| cannot(file, &e))?;
            for n in 0..instance.header.frames.len() {
                let (header, pixels) = frame(&instance, n).map_err(|e| cannot(file, &e))?;
                let count = sent + refused;
                // By the clock of the stream, not by ours: the same frames have the same times whatever the pace.
                let header = FrameHeader { time_us: (count as f64 * 1e6 / fps) as u64, ..header };
                let due = begun + step.mul_f64(count as f64);
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                match client.push_frame(header, &pixels) {
                    Ok(()) => sent += 1,
                    Err(ClientError::Refused { text, .. }) => {
                        refused += 1;
                        if first_refusal.is_none() {
                            eprintln!("scanside: frame {count}: {text}");
                            first_refusal = Some(text);
                        }
                    }
                    Err(error) => return Err(Failure::impossible(error)),
                }
            }
        }
    }
    client.released().map_err(Failure::impossible)?;
    let seconds = begun.elapsed().as_secs_f64();
    print(&match as_json {
        true => format!("{}\n", json!({"frames": sent, "refused": refused, "seconds": seconds})),
        false => format!("{sent} frames in {seconds:.1} s, {:.1} a second; {refused} refused\n", sent as f64 / seconds),
    })?;
    match first_refusal.filter(|_| sent == 0) {
        Some(text) => Err(Failure::Impossible(format!("no frame was taken: {text}"))),
        None => Ok(()),
    }
}

/// Frame `n` as the protocol has it.
fn frame(instance: &Instance<'_>, n: usize) -> Result<(FrameHeader, Vec<u8>), String> {
    let header = &instance.header;
    let record = FrameRecord::new(header, n, 0);
    let planar = Planar { spacing_mm: record.flat_spacing_mm, region: record.region };
    let clip = ClipHeader::of(record.size, planar);
    let size = |n: usize| u16::try_from(n).map_err(|_| format!("{n} pixels on a side are too many"));
    let (pixel, pixels) = if header.pixel.samples == 3 || header.pixel.photometric == "PALETTE COLOR" {
        (Pixel::Rgb8, instance.decode_frame_rgb(n).map_err(|e| e.to_string())?)
    } else if header.pixel.voxel_type().bytes() == 1 {
        let mut scratch = Vec::new();
        (Pixel::Gray8, instance.decode_frame(n, &mut scratch).map_err(|e| e.to_string())?.to_vec())
    } else {
        return Err("only frames of 8 bits are sent live".into());
    };
    let (rows, columns) = (size(header.rows)?, size(header.columns)?);
    Ok((FrameHeader { rows, columns, pixel, time_us: 0, spacing_mm: clip.spacing_mm, region: planar.region }, pixels))
}
