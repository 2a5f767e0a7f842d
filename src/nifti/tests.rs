use ndarray::Array3;

use super::*;
use crate::geometry::{Affine, norm, sub};

fn oblique() -> Affine {
    let (s, c) = 0.3f64.sin_cos();
    Affine::new([0.7 * c, 0.7 * s, 0.0], [-0.8 * s, 0.8 * c, 0.0], [0.0, 0.0, 2.5], [-120.5, 33.25, -800.125])
        .expect("an affine")
}

fn ramp(shape: (usize, usize, usize)) -> Array3<i16> {
    Array3::from_shape_fn(shape, |(k, j, i)| (k * 1000 + j * 30 + i) as i16 - 900)
}

fn close(a: &Affine, b: &Affine, within_mm: f64) {
    for p in [[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]] {
        let apart = norm(sub(a.to_lps(p), b.to_lps(p)));
        assert!(apart < within_mm, "{p:?} is {apart} mm away: {a:?} {b:?}");
    }
}

fn header_of(path: &Path) -> NiftiHeader {
    NiftiReader::open(path).expect("it opens").header().clone()
}

#[test]
fn what_is_written_is_read_back_plain_and_gzipped() {
    let folder = tempfile::tempdir().expect("a folder");
    let rescale = Rescale { slope: 2.0, intercept: -1024.0 };
    for name in ["a.nii", "a.nii.gz"] {
        let path = folder.path().join(name);
        let voxels = ramp((3, 4, 5));
        write_array(&path, voxels.view(), oblique(), rescale, None).expect("it is written");
        let volume = read(&path).expect("it is read");
        assert_eq!(volume.stored::<i16>().expect("16 bits"), voxels);
        assert_eq!(volume.rescale(), rescale);
        close(&volume.affine(), &oblique(), 1e-4);
    }
    let names: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").collect();
    assert_eq!(names.len(), 2, "no partial file is left");
}

#[test]
fn sform_and_qform_of_a_written_file_agree() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.nii");
    let flipped = Affine::new([-0.5, 0.0, 0.0], [0.0, 0.0, -2.0], [0.0, 3.0, 0.0], [1.0, 2.0, 3.0]).expect("an affine");
    for affine in [oblique(), flipped, Affine::axial(crate::geometry::Spacing::new([1.0; 3]).expect("mm"), [0.0; 3])] {
        write_array(&path, ramp((2, 3, 4)).view(), affine, Rescale::IDENTITY, None).expect("it is written");
        let header = header_of(&path);
        assert_eq!((header.form_codes, header.forms_disagree), ([1, 1], false));
        let mut bytes = std::fs::read(&path).expect("it is there");
        bytes[254..256].copy_from_slice(&[0, 0]);
        std::fs::write(&path, bytes).expect("it is written");
        let header = header_of(&path);
        assert_eq!(header.affine_source, AffineSource::Qform);
        close(&header.affine, &affine, 1e-4);
    }
}

#[test]
fn a_sheared_affine_is_kept_by_the_sform_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.nii.gz");
    let sheared = Affine::new([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 2.5], [0.0; 3]).expect("an affine");
    write_array(&path, ramp((2, 3, 4)).view(), sheared, Rescale::IDENTITY, None).expect("it is written");
    let header = header_of(&path);
    assert_eq!(header.form_codes, [1, 0]);
    close(&header.affine, &sheared, 1e-4);
}

#[test]
fn forms_that_disagree_are_told_and_the_sform_is_taken() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.nii");
    write_array(&path, ramp((2, 3, 4)).view(), oblique(), Rescale::IDENTITY, None).expect("it is written");
    let mut bytes = std::fs::read(&path).expect("it is there");
    bytes[268..272].copy_from_slice(&77f32.to_le_bytes());
    std::fs::write(&path, bytes).expect("it is written");
    let header = header_of(&path);
    assert!(header.forms_disagree);
    close(&header.affine, &oblique(), 1e-4);
}

#[test]
fn a_long_axis_makes_it_nifti_2() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("long.nii.gz");
    let voxels = Array3::from_elem((1, 1, 40_000), 7u8);
    write_array(&path, voxels.view(), oblique(), Rescale::IDENTITY, None).expect("it is written");
    assert_eq!(header_of(&path).version, 2);
    assert_eq!(read(&path).expect("it is read").stored::<u8>().expect("bytes"), voxels);
    close(&header_of(&path).affine, &oblique(), 1e-9);
}

#[test]
fn a_series_is_read_by_volumes_and_by_ranges_in_any_order() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["s.nii", "s.nii.gz"] {
        let path = folder.path().join(name);
        let spec = NiftiSpec {
            shape: [2, 3, 4],
            volumes: 5,
            affine: oblique(),
            voxel: VoxelType::F32,
            rescale: Rescale::IDENTITY,
            repetition_s: 2.5,
        };
        let mut writer = NiftiWriter::create(&path, &spec, None).expect("it begins");
        let voxels: Vec<f32> = (0..120).map(|v| v as f32).collect();
        writer.write_voxels(&voxels).expect("it goes on");
        writer.finish().expect("it ends");
        assert!(matches!(read(&path), Err(ImageFileError::Series { volumes: 5, .. })));
        let mut reader = NiftiReader::open(&path).expect("it opens");
        assert_eq!((reader.header().volumes(), reader.header().repetition_s()), (5, Some(2.5)));
        let mut some = [0.0; 3];
        for start in [100, 4, 50] {
            reader.read_f32(start, &mut some).expect("a range");
            assert_eq!(some.to_vec(), voxels[start as usize..][..3]);
        }
        assert_eq!(reader.volume(3).expect("a volume").to_f32(0..1)[[0, 0, 0]], 72.0);
    }
}

#[test]
fn a_writer_that_is_given_too_little_leaves_no_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.nii");
    let spec = NiftiSpec {
        shape: [2, 2, 2],
        volumes: 1,
        affine: oblique(),
        voxel: VoxelType::U8,
        rescale: Rescale::IDENTITY,
        repetition_s: 0.0,
    };
    let mut writer = NiftiWriter::create(&path, &spec, None).expect("it begins");
    writer.write_voxels(&[1u8; 7]).expect("it goes on");
    assert!(writer.finish().is_err());
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0);
}

#[test]
fn headers_that_lie_are_refused_with_the_field() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = folder.path().join("a.nii");
    write_array(&good, ramp((2, 3, 4)).view(), oblique(), Rescale::IDENTITY, None).expect("it is written");
    let good = std::fs::read(good).expect("it is there");
    let refused = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("it is written");
        match read(&path) {
            Err(ImageFileError::Header { field, .. }) => field,
            other => panic!("{name}: {other:?}"),
        }
    };
    let huge = i16::MAX.to_le_bytes();
    assert_eq!(refused("claims too much", &|b| b[42..44].copy_from_slice(&huge)), "dim");
    assert_eq!(refused("no extent", &|b| b[44..46].copy_from_slice(&[0, 0])), "dim");
    assert_eq!(refused("nine dimensions", &|b| b[40] = 9), "dim[0]");
    assert_eq!(refused("complex", &|b| b[70] = 32), "datatype");
    assert_eq!(refused("cut", &|b| b.truncate(300)), "sizeof_hdr");
    assert_eq!(refused("cut voxels", &|b| b.truncate(360)), "dim");
    assert_eq!(refused("text", &|b| b.fill(b'x')), "sizeof_hdr");
    assert_eq!(refused("offset", &|b| b[108..112].copy_from_slice(&f32::NAN.to_le_bytes())), "vox_offset");
    let flat = |b: &mut Vec<u8>| {
        b[252..256].fill(0);
        b[80..84].fill(0);
    };
    assert_eq!(refused("zero spacing", &flat), "pixdim");
    assert_eq!(refused("singular", &|b| b[280..296].fill(0)), "srow");
}

#[test]
fn a_gzip_bomb_is_read_no_further_than_its_header_claims() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bomb.nii.gz");
    // 4 voxels by its header, then 64 MiB of zeros.
    let small = folder.path().join("a.nii");
    write_array(&small, ramp((1, 2, 2)).view(), oblique(), Rescale::IDENTITY, None).expect("it is written");
    let mut bytes = std::fs::read(&small).expect("it is there");
    bytes.resize(64 << 20, 0);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(1));
    std::io::Write::write_all(&mut gz, &bytes).expect("memory");
    std::fs::write(&path, gz.finish().expect("memory")).expect("it is written");
    assert_eq!(read(&path).expect("its four voxels").shape(), [1, 2, 2]);
}
