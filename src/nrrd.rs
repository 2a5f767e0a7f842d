//! NRRD in: attached (`.nrrd`) and detached (`.nhdr`) headers, raw and gzipped voxels
//! (teem.sourceforge.net/nrrd/format.html).

use std::collections::HashMap;
use std::io;
use std::path::Path;

use crate::geometry::{Affine, Grid, Spacing, norm};
use crate::nifti::ImageFileError;
use crate::nifti::source::ByteSource;
use crate::volume::{Rescale, Volume, VoxelType};

/// Bytes of a header. Key/value pairs may be many; voxels are not text.
const HEADER_BYTES_MAX: usize = 1 << 20;

struct Header {
    voxel: VoxelType,
    grid: Grid,
    big_endian: bool,
    gzip: bool,
    data_file: Option<String>,
    skip_lines: usize,
    /// None: count from the file's end.
    skip_bytes: Option<u64>,
    /// Where the header ends in the file.
    end: usize,
}

type Bad = (&'static str, String);

/// Whether these first bytes are of a NRRD.
pub fn is_nrrd(start: &[u8]) -> bool {
    start.starts_with(b"NRRD000")
}

/// Reads a file with one 3-D (or 2-D) volume.
///
/// # Errors
/// [`ImageFileError`].
pub fn read(path: &Path) -> Result<Volume, ImageFileError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ImageFileError::Io { doing: "read", path, source }
    };
    let bad = |(field, why): Bad| ImageFileError::Header { path: path.to_owned(), field, why };
    let start = ByteSource::open_part(path, 0, false).and_then(|mut s| s.start(HEADER_BYTES_MAX)).map_err(io(path))?;
    let header = parse(&start).map_err(bad)?;
    let (data, base) = match &header.data_file {
        None => (path.to_owned(), header.end as u64),
        // Only a plain name beside the header: a header must not reach elsewhere.
        Some(name) if Path::new(name).components().count() == 1 && !name.starts_with("..") => (path.with_file_name(name), 0),
        Some(name) => return Err(bad(("data file", format!("{name:?} is no file beside the header")))),
    };
    let bytes = (header.grid.voxels() * header.voxel.bytes()) as u64;
    let base = base + line_skip(&data, base, header.skip_lines).map_err(io(&data))?;
    let (base, skip) = match header.skip_bytes {
        Some(skip) if header.gzip => (base, skip),
        Some(skip) => (base + skip, 0),
        None if header.gzip => return Err(bad(("byte skip", "-1 is for raw voxels only".into()))),
        None => {
            let length = std::fs::metadata(&data).map_err(io(&data))?.len();
            (length.checked_sub(bytes).ok_or_else(|| bad(("sizes", "more than the file can hold".into())))?, 0)
        }
    };
    let mut source = ByteSource::open_part(&data, base, header.gzip).map_err(io(&data))?;
    if !source.can_hold(bytes) {
        return Err(bad(("sizes", format!("{:?} voxels are more than the file can hold", header.grid.shape))));
    }
    let width = header.voxel.bytes();
    let slice = (header.grid.shape[1] * header.grid.shape[2] * width) as u64;
    Volume::build(header.grid, header.voxel, Rescale::IDENTITY, |k, out| {
        source.read_at(skip + k as u64 * slice, out).map_err(io(&data))?;
        if header.big_endian && width > 1 {
            out.chunks_exact_mut(width).for_each(<[u8]>::reverse);
        }
        Ok(())
    })
}

fn line_skip(path: &Path, base: u64, lines: usize) -> io::Result<u64> {
    if lines == 0 {
        return Ok(0);
    }
    let start = ByteSource::open_part(path, base, false)?.start(HEADER_BYTES_MAX)?;
    let ends = start.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(at, _)| at as u64 + 1);
    ends.take(lines).last().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn parse(start: &[u8]) -> Result<Header, Bad> {
    if !is_nrrd(start) {
        return Err(("magic", "this is no NRRD file".into()));
    }
    let mut fields: HashMap<String, String> = HashMap::new();
    let mut end = None;
    let mut at = 0;
    while let Some(length) = start[at..].iter().position(|b| *b == b'\n') {
        let line = start[at..at + length].trim_ascii_end();
        at += length + 1;
        if line.is_empty() {
            end = Some(at);
            break;
        }
        let line = String::from_utf8_lossy(line);
        // `key:=value` pairs are free text and say nothing about the voxels.
        if line.starts_with('#') || line.contains(":=") {
            continue;
        }
        if let Some((name, value)) = line.split_once(':') {
            fields.insert(name.trim().to_lowercase(), value.trim().to_owned());
        }
    }
    let data_file = fields.get("data file").or_else(|| fields.get("datafile")).cloned();
    let end = match (end, &data_file) {
        (Some(end), _) => end,
        (None, Some(_)) => start.len(),
        (None, None) => return Err(("magic", "the header has no end".into())),
    };
    let field = |name: &'static str| fields.get(name).map(String::as_str).ok_or((name, "is missing".to_owned()));
    let voxel = match field("type")?.to_lowercase().as_str() {
        "uchar" | "unsigned char" | "uint8" | "uint8_t" => VoxelType::U8,
        "signed char" | "int8" | "int8_t" => VoxelType::I8,
        "short" | "short int" | "signed short" | "signed short int" | "int16" | "int16_t" => VoxelType::I16,
        "ushort" | "unsigned short" | "unsigned short int" | "uint16" | "uint16_t" => VoxelType::U16,
        "int" | "signed int" | "int32" | "int32_t" => VoxelType::I32,
        "uint" | "unsigned int" | "uint32" | "uint32_t" => VoxelType::U32,
        "float" => VoxelType::F32,
        "double" => VoxelType::F64,
        other => return Err(("type", format!("{other:?} is not read"))),
    };
    let gzip = match field("encoding")?.to_lowercase().as_str() {
        "raw" => false,
        "gzip" | "gz" => true,
        other => return Err(("encoding", format!("{other:?} is not read"))),
    };
    let big_endian = match (voxel.bytes(), fields.get("endian").map(|e| e.to_lowercase())) {
        (1, _) => false,
        (_, Some(e)) if e == "little" => false,
        (_, Some(e)) if e == "big" => true,
        _ => return Err(("endian", "is missing".into())),
    };
    let sizes: Vec<usize> = field("sizes")?.split_whitespace().filter_map(|n| n.parse().ok()).filter(|n| *n > 0).collect();
    let dimension = field("dimension")?.parse::<usize>().ok();
    if dimension != Some(sizes.len()) || !(2..=3).contains(&sizes.len()) {
        return Err(("sizes", format!("{} where two or three extents are wanted", field("sizes")?)));
    }
    let extents = [sizes.get(2).copied().unwrap_or(1), sizes[1], sizes[0]];
    if extents.iter().try_fold(8u64, |n, e| n.checked_mul(*e as u64)).is_none_or(|n| n > 1 << 42) {
        return Err(("sizes", format!("{extents:?} is beyond any file")));
    }
    let affine = affine_of(&fields, sizes.len())?;
    let number = |names: [&'static str; 2]| match names.iter().find_map(|n| fields.get(*n)) {
        None => Ok(0i64),
        Some(text) => text.parse().map_err(|_| (names[0], format!("{text:?} is no number"))),
    };
    let skip_bytes = match number(["byte skip", "byteskip"])? {
        -1 => None,
        n => Some(u64::try_from(n).map_err(|_| ("byte skip", n.to_string()))?),
    };
    let skip_lines = usize::try_from(number(["line skip", "lineskip"])?).map_err(|_| ("line skip", "negative".into()))?;
    Ok(Header { voxel, grid: Grid { shape: extents, affine }, big_endian, gzip, data_file, skip_lines, skip_bytes, end })
}

/// Where the voxels are. Without a space (or with an unnamed one) the directions are taken as LPS, which ITK does too.
fn affine_of(fields: &HashMap<String, String>, dimension: usize) -> Result<Affine, Bad> {
    let sign = match fields.get("space").map(|s| s.to_lowercase()).as_deref() {
        None | Some("left-posterior-superior" | "lps" | "3d-right-handed" | "scanner-xyz") => [1.0, 1.0, 1.0],
        Some("right-anterior-superior" | "ras") => [-1.0, -1.0, 1.0],
        Some("left-anterior-superior" | "las") => [1.0, -1.0, 1.0],
        Some(other) => return Err(("space", format!("{other:?} is not read"))),
    };
    // An image in a plane of its own, as ITK writes one slice: the plane is taken for an axial one at height 0.
    let flat = fields.get("space dimension").is_some_and(|n| n == "2");
    let vector = |text: &str| -> Option<[f64; 3]> {
        let inner = text.trim().strip_prefix('(')?.strip_suffix(')')?;
        let numbers: Vec<f64> = inner.split(',').filter_map(|n| n.trim().parse().ok()).collect();
        let v: [f64; 3] = match numbers[..] {
            [x, y] if flat => [x, y, 0.0],
            [x, y, z] => [x, y, z],
            _ => return None,
        };
        Some([v[0] * sign[0], v[1] * sign[1], v[2] * sign[2]])
    };
    let origin = match fields.get("space origin") {
        Some(text) => vector(text).ok_or_else(|| ("space origin", format!("{text:?} is no position")))?,
        None => [0.0; 3],
    };
    let bad = |field, why: String| Err((field, why));
    if let Some(text) = fields.get("space directions") {
        let steps: Option<Vec<[f64; 3]>> =
            text.split_inclusive(')').map(str::trim).filter(|part| !part.is_empty()).map(vector).collect();
        let Some(steps) = steps.filter(|steps| steps.len() == dimension) else {
            return bad("space directions", format!("{text:?} are not {dimension} vectors of space"));
        };
        let across = crate::geometry::cross(steps[0], steps[1]);
        let third = steps.get(2).copied().unwrap_or_else(|| across.map(|v| v / norm(across).max(1e-9)));
        return Affine::new(steps[0], steps[1], third, origin).or_else(|e| bad("space directions", e.to_string()));
    }
    let spacings: Vec<f64> = match fields.get("spacings") {
        Some(text) => text.split_whitespace().filter_map(|n| n.parse().ok()).collect(),
        None => vec![1.0; dimension],
    };
    let at = |n: usize| spacings.get(n).copied().unwrap_or(1.0);
    match Spacing::new([at(2), at(1), at(0)]) {
        Ok(spacing) => Ok(Affine::axial(spacing, origin)),
        Err(e) => bad("spacings", e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "NRRD0004\n# by hand\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 3 2 2\n\
        space directions: (0.5,0,0) (0,0.6,0) (0,0,2)\nkinds: domain domain domain\nendian: big\nencoding: raw\n\
        space origin: (-1,-2,3)\n";

    fn voxels() -> Vec<u8> {
        (0..12i16).flat_map(i16::to_be_bytes).collect()
    }

    fn check(path: &Path) {
        let volume = read(path).expect("it is read");
        assert_eq!(volume.shape(), [2, 2, 3]);
        assert_eq!(volume.stored::<i16>().expect("16 bits")[[1, 0, 2]], 8);
        assert_eq!(volume.affine().to_lps([1.0, 1.0, 1.0]), [-0.5, -1.4, 5.0]);
    }

    #[test]
    fn attached_detached_raw_and_gzipped_voxels_are_the_same() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.nrrd");
        std::fs::write(&path, [HEADER.as_bytes(), b"\n", &voxels()].concat()).expect("it is written");
        check(&path);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut gz, &voxels()).expect("memory");
        let gz = gz.finish().expect("memory");
        let header = HEADER.replace("raw", "gzip");
        std::fs::write(&path, [header.as_bytes(), b"\n", &gz].concat()).expect("it is written");
        check(&path);
        let path = folder.path().join("b.nhdr");
        std::fs::write(folder.path().join("b.raw"), voxels()).expect("it is written");
        std::fs::write(&path, format!("{HEADER}data file: b.raw\n")).expect("it is written");
        check(&path);
    }

    #[test]
    fn one_slice_in_a_plane_of_its_own_is_read_as_an_axial_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("flat.nrrd");
        let header = "NRRD0004\ntype: short\ndimension: 2\nspace dimension: 2\nsizes: 4 3\nspace directions: (0.5,0) (0,0.6)\n\
            endian: big\nencoding: raw\nspace origin: (-1,-2)\n\n";
        std::fs::write(&path, [header.as_bytes(), &voxels()].concat()).expect("it is written");
        let volume = read(&path).expect("it is read");
        assert_eq!(volume.shape(), [1, 3, 4]);
        assert_eq!(volume.affine().to_lps([1.0, 1.0, 1.0]), [-0.5, -1.4, 1.0]);
    }

    #[test]
    fn ras_is_turned_to_lps_and_wrong_headers_name_their_field() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.nrrd");
        let with = |from: &str, to: &str| {
            let header = HEADER.replace(from, to);
            std::fs::write(&path, [header.as_bytes(), b"\n", &voxels()].concat()).expect("it is written");
            read(&path)
        };
        let volume = with("left-posterior-superior", "RAS").expect("it is read");
        assert_eq!(volume.affine().origin(), [1.0, 2.0, 3.0]);
        for (from, to, field) in [
            ("sizes: 3 2 2", "sizes: 3 2 2000000", "sizes"),
            ("short", "block", "type"),
            ("encoding: raw", "encoding: bzip2", "encoding"),
            ("endian: big\n", "", "endian"),
            ("(0,0,2)", "(0,0,0)", "space directions"),
            ("endian: big\n", "endian: big\ndata file: ../etc/x\n", "data file"),
        ] {
            match with(from, to) {
                Err(ImageFileError::Header { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{to}: {other:?}"),
            }
        }
    }
}
