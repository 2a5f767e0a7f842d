//! Surfaces as files: binary STL, PLY, OBJ and glTF. Coordinates are LPS millimetres and say so where the format has
//! room for it; glTF asks for metres with y up, which its node's matrix does.

use std::io::{self, Seek, SeekFrom, Write};

use serde_json::json;

use super::{Patch, Surface, area_vector, bounds};
use crate::geometry::norm;

/// A file format of surfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Binary stereolithography: triangles without shared vertices.
    Stl,
    /// Stanford polygon format, binary little endian.
    Ply,
    /// Wavefront, text.
    Obj,
    /// glTF 2.0 in one binary file.
    Glb,
    /// glTF 2.0 as JSON, the numbers embedded.
    Gltf,
}

impl Format {
    /// By the extension of a file name, in any case.
    pub fn of_extension(extension: &str) -> Option<Self> {
        Some(match extension.to_ascii_lowercase().as_str() {
            "stl" => Self::Stl,
            "ply" => Self::Ply,
            "obj" => Self::Obj,
            "glb" => Self::Glb,
            "gltf" => Self::Gltf,
            _ => return None,
        })
    }
}

/// Bytes of an STL header, without the count.
const STL_HEADER: &[u8; 80] =
    b"scanside surface, binary STL, millimetres, SPACE=LPS                            ";

/// Writes binary STL as the triangles come; the count is set at the end.
pub struct StlWriter<W> {
    out: W,
    triangles: u64,
    bytes: Vec<u8>,
}

impl<W: Write + Seek> StlWriter<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// What the disk answers.
    pub fn new(mut out: W) -> io::Result<Self> {
        out.write_all(STL_HEADER)?;
        out.write_all(&0u32.to_le_bytes())?;
        Ok(Self { out, triangles: 0, bytes: Vec::new() })
    }

    /// Writes the triangles of a patch.
    ///
    /// # Errors
    /// What the disk answers.
    pub fn push(&mut self, patch: &Patch) -> io::Result<()> {
        self.write(&patch.vertices, &patch.triangles)
    }

    /// Writes triangles of `vertices`.
    ///
    /// # Errors
    /// What the disk answers.
    pub fn write(&mut self, vertices: &[[f32; 3]], triangles: &[[u32; 3]]) -> io::Result<()> {
        for some in triangles.chunks(1 << 14) {
            self.bytes.clear();
            for triangle in some {
                let corners = triangle.map(|v| vertices[v as usize]);
                let mut record = [0u8; 50];
                let rows = [unit(area_vector(corners)), corners[0], corners[1], corners[2]];
                for (to, value) in record.chunks_exact_mut(4).zip(rows.iter().flatten()) {
                    to.copy_from_slice(&value.to_le_bytes());
                }
                self.bytes.extend_from_slice(&record);
            }
            self.out.write_all(&self.bytes)?;
        }
        self.triangles += triangles.len() as u64;
        Ok(())
    }

    /// Sets the count and hands the file back.
    ///
    /// # Errors
    /// What the disk answers; `InvalidData` above the 2^32 triangles the format can count.
    pub fn finish(mut self) -> io::Result<W> {
        let count = u32::try_from(self.triangles)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "STL counts no more than 4,294,967,295 triangles"))?;
        self.out.seek(SeekFrom::Start(80))?;
        self.out.write_all(&count.to_le_bytes())?;
        self.out.flush()?;
        Ok(self.out)
    }
}

fn unit(v: [f64; 3]) -> [f32; 3] {
    let length = norm(v);
    if length > 0.0 { v.map(|c| (c / length) as f32) } else { [0.0; 3] }
}

/// Writes PLY, binary little endian.
///
/// # Errors
/// What the disk answers.
pub fn write_ply(surface: &Surface, mut out: impl Write) -> io::Result<()> {
    write!(
        out,
        "ply\nformat binary_little_endian 1.0\ncomment scanside surface, millimetres\ncomment SPACE=LPS\n\
         element vertex {}\nproperty float x\nproperty float y\nproperty float z\n\
         element face {}\nproperty list uchar uint vertex_indices\nend_header\n",
        surface.vertices.len(),
        surface.triangles.len()
    )?;
    write_numbers(&mut out, surface.vertices.iter().flatten().map(|v| v.to_le_bytes()))?;
    for triangles in surface.triangles.chunks(1 << 14) {
        let mut bytes = Vec::with_capacity(triangles.len() * 13);
        for triangle in triangles {
            bytes.push(3);
            triangle.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
        }
        out.write_all(&bytes)?;
    }
    out.flush()
}

/// Writes Wavefront OBJ.
///
/// # Errors
/// What the disk answers.
pub fn write_obj(surface: &Surface, mut out: impl Write) -> io::Result<()> {
    writeln!(out, "# scanside surface, millimetres\n# SPACE=LPS")?;
    for [x, y, z] in &surface.vertices {
        writeln!(out, "v {x} {y} {z}")?;
    }
    for triangle in &surface.triangles {
        let [a, b, c] = triangle.map(|v| u64::from(v) + 1);
        writeln!(out, "f {a} {b} {c}")?;
    }
    out.flush()
}

/// The JSON part of a glTF 2.0 asset: one mesh, positions, normals, indices, in one buffer.
fn gltf_json(surface: &Surface, uri: Option<String>) -> serde_json::Value {
    let (least, greatest) = bounds(&surface.vertices);
    let points = surface.vertices.len() * 12;
    let indices = surface.triangles.len() * 12;
    let mut buffer = json!({"byteLength": 2 * points + indices});
    if let Some(uri) = uri {
        buffer["uri"] = uri.into();
    }
    json!({
        "asset": {"version": "2.0", "generator": "scanside"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        // Left is +x, the head +y, the face +z; metres.
        "nodes": [{"mesh": 0, "name": "surface",
            "matrix": [0.001, 0.0, 0.0, 0.0, 0.0, 0.0, -0.001, 0.0, 0.0, 0.001, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]}],
        "materials": [{"doubleSided": true,
            "pbrMetallicRoughness": {"baseColorFactor": [0.87, 0.80, 0.70, 1.0], "metallicFactor": 0.0, "roughnessFactor": 0.7}}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "NORMAL": 1}, "indices": 2, "material": 0}]}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": surface.vertices.len(), "type": "VEC3", "min": least, "max": greatest},
            {"bufferView": 1, "componentType": 5126, "count": surface.vertices.len(), "type": "VEC3"},
            {"bufferView": 2, "componentType": 5125, "count": surface.triangles.len() * 3, "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": points, "target": 34962},
            {"buffer": 0, "byteOffset": points, "byteLength": points, "target": 34962},
            {"buffer": 0, "byteOffset": 2 * points, "byteLength": indices, "target": 34963},
        ],
        "buffers": [buffer],
    })
}

fn write_gltf_numbers(surface: &Surface, mut out: impl Write) -> io::Result<()> {
    write_numbers(&mut out, surface.vertices.iter().flatten().map(|v| v.to_le_bytes()))?;
    write_numbers(&mut out, normals(surface).iter().flatten().map(|v| v.to_le_bytes()))?;
    write_numbers(&mut out, surface.triangles.iter().flatten().map(|v| v.to_le_bytes()))
}

/// Writes glTF 2.0 as one binary file.
///
/// # Errors
/// What the disk answers; `InvalidData` above the 4 GiB the format can hold, or for a surface without triangles, which
/// it has no way to say.
pub fn write_glb(surface: &Surface, mut out: impl Write) -> io::Result<()> {
    refuse_empty(surface)?;
    let mut text = gltf_json(surface, None).to_string();
    while !text.len().is_multiple_of(4) {
        text.push(' ');
    }
    let numbers = surface.vertices.len() * 24 + surface.triangles.len() * 12;
    let length = |n: usize| {
        u32::try_from(n).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the surface is above 4 GiB, too large for glTF"))
    };
    out.write_all(b"glTF")?;
    out.write_all(&2u32.to_le_bytes())?;
    out.write_all(&length(12 + 8 + text.len() + 8 + numbers)?.to_le_bytes())?;
    out.write_all(&length(text.len())?.to_le_bytes())?;
    out.write_all(b"JSON")?;
    out.write_all(text.as_bytes())?;
    out.write_all(&length(numbers)?.to_le_bytes())?;
    out.write_all(b"BIN\0")?;
    write_gltf_numbers(surface, &mut out)?;
    out.flush()
}

/// Writes glTF 2.0 as JSON with its numbers embedded in base 64.
///
/// # Errors
/// As [`write_glb`].
pub fn write_gltf(surface: &Surface, mut out: impl Write) -> io::Result<()> {
    refuse_empty(surface)?;
    let mut bytes = Vec::new();
    write_gltf_numbers(surface, &mut bytes)?;
    let uri = format!("data:application/octet-stream;base64,{}", base64(&bytes));
    out.write_all(gltf_json(surface, Some(uri)).to_string().as_bytes())?;
    out.flush()
}

fn refuse_empty(surface: &Surface) -> io::Result<()> {
    if surface.triangles.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "glTF cannot hold a surface without triangles"));
    }
    Ok(())
}

/// Base 64 (RFC 4648) with padding.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().enumerate().fold(0u32, |word, (n, byte)| word | u32::from(*byte) << (16 - 8 * n));
        for n in 0..4 {
            text.push(if n <= three.len() { DIGITS[(word >> (18 - 6 * n) & 63) as usize] as char } else { '=' });
        }
    }
    text
}

fn write_numbers(out: &mut impl Write, numbers: impl Iterator<Item = [u8; 4]>) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(1 << 16);
    for number in numbers {
        bytes.extend_from_slice(&number);
        if bytes.len() >= 1 << 16 {
            out.write_all(&bytes)?;
            bytes.clear();
        }
    }
    out.write_all(&bytes)
}

/// Unit normals of the vertices: the mean of their triangles', weighted by area.
pub(crate) fn normals(surface: &Surface) -> Vec<[f32; 3]> {
    let mut sums = vec![[0.0f64; 3]; surface.vertices.len()];
    for triangle in &surface.triangles {
        let normal = area_vector(triangle.map(|v| surface.vertices[v as usize]));
        for v in triangle {
            sums[*v as usize].iter_mut().zip(normal).for_each(|(s, n)| *s += n);
        }
    }
    // glTF wants unit length everywhere; a vertex of degenerate triangles gets any.
    sums.into_iter().map(|s| if norm(s) > 0.0 { unit(s) } else { [0.0, 0.0, 1.0] }).collect()
}
