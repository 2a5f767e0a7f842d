use std::time::{Duration, Instant};

use super::*;
use crate::dicom::build::{SeriesTemplate, SliceTemplate};
use crate::dicom::decodable_transfer_syntaxes;
use crate::geometry::Reason;
use crate::series::files::{FilesError, scan};

const AXIAL: [f64; 6] = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];

/// One image: where it stands, and the value of all its pixels.
#[derive(Clone)]
struct Image {
    series: &'static str,
    patient: &'static str,
    number: usize,
    z: f64,
    value: i16,
    size: [usize; 2],
    intercept: f64,
    image_type: &'static str,
    orientation: [f64; 6],
    more: Vec<(crate::dicom::Tag, [u8; 2], String)>,
}

fn image(series: &'static str, number: usize) -> Image {
    Image {
        series,
        patient: "1",
        number,
        z: 2.0 * number as f64,
        value: number as i16 * 10,
        size: [4, 6],
        intercept: -1024.0,
        image_type: "ORIGINAL\\PRIMARY\\AXIAL",
        orientation: AXIAL,
        more: Vec::new(),
    }
}

impl Image {
    fn file(&self) -> Vec<u8> {
        let template = SeriesTemplate {
            modality: Modality::Ct,
            study: Uid::derived(b"study"),
            series: Uid::derived(self.series.as_bytes()),
            frame_of_reference: Uid::derived(b"frame"),
            patient_name: "A".into(),
            patient_id: self.patient.into(),
            description: String::new(),
            date_time: Default::default(),
            series_number: 1,
            size: self.size,
            voxel: VoxelType::I16,
            bits_stored: 16,
            thickness_mm: 5.0,
            window: None,
            regions: Vec::new(),
            more: self.more.clone(),
        };
        let pixels: Vec<u8> = self.value.to_le_bytes().repeat(self.size[0] * self.size[1]);
        let plane = Plane::new([0.0, 0.0, self.z], self.orientation, [0.7, 0.7]).expect("a plane");
        let rescale = Rescale { slope: 1.0, intercept: self.intercept };
        let slice = SliceTemplate {
            number: self.number,
            plane: Some(plane),
            rescale,
            image_type: self.image_type,
            pixels: &pixels,
        };
        template.image(&slice, &decodable_transfer_syntaxes()[0]).expect("it is built")
    }
}

struct Bench {
    assembler: Assembler,
    now: Instant,
    spool: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let spool = tempfile::tempdir().expect("a folder");
        Self { assembler: Assembler::new(spool.path(), Limits::default()), now: Instant::now(), spool }
    }

    fn add(&mut self, source: u64, image: &Image) -> Result<Added, AddError> {
        self.assembler.add(self.now, source, &image.file())
    }

    fn add_all(&mut self, source: u64, images: &[Image]) {
        for image in images {
            self.add(source, image).expect("it is added");
        }
    }

    fn wait(&mut self, seconds: u64) -> Vec<SeriesOutcome> {
        self.now += Duration::from_secs(seconds);
        self.assembler.tick(self.now);
        self.assembler.take_finished()
    }

    fn release(&mut self, source: u64) -> Vec<SeriesOutcome> {
        self.assembler.released(self.now, source);
        self.assembler.take_finished()
    }
}

fn one(mut outcomes: Vec<SeriesOutcome>) -> SeriesOutcome {
    assert_eq!(outcomes.len(), 1, "{outcomes:?}");
    outcomes.pop().expect("one")
}

fn volume(outcomes: Vec<SeriesOutcome>) -> Assembled {
    one(outcomes).result.expect("a volume")
}

/// The value of each slice, in real numbers.
fn values(volume: &Volume) -> Vec<f32> {
    (0..volume.shape()[0]).map(|k| volume.to_f32(k..k + 1)[[0, 0, 0]]).collect()
}

#[test]
fn slices_in_any_order_make_the_same_volume() {
    let images: Vec<Image> = (0..7).map(|n| image("a", n)).collect();
    for order in [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 5, 2, 4]] {
        let mut bench = Bench::new();
        for n in order {
            bench.add(1, &images[n]).expect("it is added");
        }
        let assembled = volume(bench.release(1));
        assert_eq!(values(&assembled.volume), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0].map(|v| v - 1024.0));
        assert_eq!(assembled.volume.affine().step(2), [0.0, 0.0, 2.0]);
        assert!(assembled.verdict.is_whole());
        assert_eq!(assembled.completed_by, Completion::Released);
        let numbers: Vec<Uid> = assembled.sources.iter().flatten().map(|s| s.sop_instance.clone()).collect();
        let expected = (0..7).map(|n| crate::dicom::build::sop_instance(&Uid::derived(b"a"), n));
        assert_eq!(numbers, expected.collect::<Vec<_>>());
        assert_eq!(std::fs::read_dir(bench.spool.path()).expect("a folder").count(), 0, "nothing is left behind");
    }
}

#[test]
fn a_frame_can_be_read_as_soon_as_it_is_in() {
    let mut bench = Bench::new();
    for n in [5, 2] {
        let added = bench.add(1, &image("a", n)).expect("it is added");
        let frame = added.frames[0];
        let reader = added.reader.expect("a reader");
        assert!(reader.is_written(frame.slot));
        assert_eq!(reader.stored_slice::<i16>(frame.slot).expect("16 bits")[[3, 5]], n as i16 * 10);
        assert_eq!(frame.along_normal_mm, Some(2.0 * n as f64));
    }
}

#[test]
fn interleaved_series_of_two_senders_end_with_their_own_sender() {
    let mut bench = Bench::new();
    for n in 0..5 {
        bench.add(1, &image("a", n)).expect("it is added");
        bench.add(2, &image("b", 4 - n)).expect("it is added");
    }
    assert_eq!(one(bench.release(2)).series, Uid::derived(b"b"));
    assert_eq!(one(bench.release(1)).series, Uid::derived(b"a"));
}

#[test]
fn a_gap_waits_for_its_slice_and_is_named_when_time_is_up() {
    let mut bench = Bench::new();
    for n in [0, 1, 2, 4, 5] {
        bench.add(1, &image("a", n)).expect("it is added");
    }
    assert!(bench.release(1).is_empty());
    assert!(bench.wait(30).is_empty());
    let assembled = volume(bench.wait(30));
    assert_eq!(assembled.verdict.missing_slices, [3]);
    assert_eq!(assembled.completed_by, Completion::Idle);
    assert_eq!(values(&assembled.volume)[2..5], [-1004.0, -1024.0, -984.0], "the lowest value fills the gap");
    assert_eq!(assembled.slots[3], None);

    let mut bench = Bench::new();
    for n in [0, 1, 2, 4, 5] {
        bench.add(1, &image("a", n)).expect("it is added");
    }
    bench.release(1);
    bench.add(2, &image("a", 3)).expect("it is added");
    bench.add(2, &image("a", 6)).expect("it is added");
    assert!(volume(bench.release(2)).verdict.is_whole(), "a second association brought what was missing");
}

#[test]
fn a_sender_with_one_association_per_image_is_waited_for() {
    let mut bench = Bench::new();
    for n in 0..4 {
        bench.add(n, &image("a", n as usize)).expect("it is added");
        assert!(bench.release(n).is_empty());
    }
    assert_eq!(volume(bench.wait(60)).volume.shape(), [4, 4, 6]);
}

#[test]
fn the_announced_number_ends_a_series_whose_sender_stays() {
    let mut bench = Bench::new();
    let announced = |n| Image { more: vec![(crate::dicom::tags::IMAGES_IN_ACQUISITION, *b"IS", "3".into())], ..image("a", n) };
    bench.add_all(1, &[announced(0), announced(1)]);
    assert!(bench.wait(6).is_empty());
    bench.add_all(1, &[announced(2)]);
    assert!(bench.wait(2).is_empty(), "another acquisition may follow");
    assert_eq!(volume(bench.wait(4)).completed_by, Completion::Counted);
}

#[test]
fn what_was_announced_is_waited_for_over_several_associations_and_named_when_it_does_not_come() {
    let announced = |n| Image { more: vec![(crate::dicom::tags::IMAGES_IN_ACQUISITION, *b"IS", "6".into())], ..image("a", n) };
    let mut bench = Bench::new();
    bench.add_all(1, &[announced(0), announced(1), announced(2)]);
    assert!(bench.release(1).is_empty(), "half of it");
    bench.add_all(2, &[announced(3), announced(4), announced(5)]);
    assert_eq!(volume(bench.release(2)).completed_by, Completion::Released);

    bench = Bench::new();
    bench.add_all(1, &[announced(0), announced(1), announced(2)]);
    assert!(bench.release(1).is_empty());
    assert_eq!(volume(bench.wait(60)).completed_by, Completion::Short { announced: 6, came: 3 });
}

#[test]
fn a_series_whose_sender_went_silent_is_known_from_one_that_was_sent_to_its_end() {
    let images = [image("a", 0), image("a", 1), image("a", 2)];
    let begun = || {
        let mut bench = Bench::new();
        bench.add_all(1, &images);
        bench
    };
    // The cable: nothing is heard, or the connection breaks.
    assert_eq!(volume(begun().wait(60)).completed_by, Completion::Lost);
    let mut bench = begun();
    bench.assembler.lost(1);
    assert_eq!(volume(bench.wait(60)).completed_by, Completion::Lost);
    // It comes again with one image, and goes in good order.
    let mut bench = begun();
    bench.assembler.lost(1);
    bench.add_all(2, &[image("a", 3)]);
    assert!(bench.release(2).is_empty());
    assert_eq!(volume(bench.wait(60)).completed_by, Completion::Idle);
    // It stays connected and goes on to another series.
    let mut bench = begun();
    bench.now += Duration::from_secs(30);
    bench.add_all(1, &[image("b", 0)]);
    assert_eq!(volume(bench.wait(30)).completed_by, Completion::Idle);
}

#[test]
fn the_same_instance_again_is_taken_once() {
    let mut bench = Bench::new();
    bench.add_all(1, &[image("a", 0), image("a", 1)]);
    let again = bench.add(1, &image("a", 1)).expect("it is acknowledged");
    assert_eq!((again.arrival, again.frames.len()), (Arrival::Duplicate, 0));
    assert_eq!(volume(bench.release(1)).volume.shape()[0], 2);
    let late = bench.add(2, &image("a", 1)).expect("it is acknowledged");
    assert_eq!(late.arrival, Arrival::Duplicate);
    let late = bench.add(2, &image("a", 2)).expect("it is acknowledged");
    assert_eq!(late.arrival, Arrival::Late);
}

#[test]
fn the_same_image_under_another_name_is_taken_once_and_another_image_spoils_the_series() {
    let twin = Image { z: 2.0, value: 10, ..image("a", 9) };
    let mut bench = Bench::new();
    bench.add_all(1, &[image("a", 0), image("a", 1), image("a", 2), twin.clone()]);
    let assembled = volume(bench.release(1));
    assert_eq!((assembled.volume.shape()[0], assembled.verdict.duplicates()), (3, 1));

    let mut bench = Bench::new();
    bench.add_all(1, &[image("a", 0), image("a", 1), image("a", 2), Image { value: 11, ..twin }]);
    let rejection = one(bench.release(1)).result.expect_err("a conflict");
    assert_eq!(rejection.code, RejectionCode::ConflictingDuplicate);

    let mut bench = Bench::new();
    bench.add_all(1, &[image("a", 0), image("a", 1)]);
    let other = Image { value: 99, ..image("a", 1) };
    assert!(matches!(bench.add(1, &other), Err(AddError::Rejected(r)) if r.code == RejectionCode::ConflictingDuplicate));
    assert!(one(bench.release(1)).result.is_err());
}

#[test]
fn a_frame_of_reference_that_comes_late_holds_for_what_comes_after_it() {
    let of = |n, frame: Option<&str>| {
        let tag = crate::dicom::tags::FRAME_OF_REFERENCE_UID;
        Image { more: vec![(tag, *b"UI", frame.unwrap_or_default().to_owned())], ..image("a", n) }
    };
    let mut bench = Bench::new();
    bench.add_all(1, &[of(0, None), of(1, Some("1.2.3"))]);
    assert!(matches!(bench.add(1, &of(2, Some("1.2.4"))), Err(AddError::Rejected(r)) if r.code == RejectionCode::MixedStudy));
}

#[test]
fn a_second_patient_spoils_the_series() {
    let mut bench = Bench::new();
    bench.add_all(1, &[image("a", 0), image("a", 1)]);
    let other = Image { patient: "2", ..image("a", 2) };
    assert!(matches!(bench.add(1, &other), Err(AddError::Rejected(r)) if r.code == RejectionCode::MixedStudy));
    assert_eq!(one(bench.release(1)).result.expect_err("mixed").code, RejectionCode::MixedStudy);
}

#[test]
fn a_scout_of_another_size_is_set_aside_though_it_came_first() {
    let scout = Image { size: [8, 8], image_type: "ORIGINAL\\PRIMARY\\LOCALIZER", ..image("a", 0) };
    let mut bench = Bench::new();
    bench.add_all(1, &[scout]);
    bench.add_all(1, &(1..6).map(|n| image("a", n)).collect::<Vec<_>>());
    let assembled = volume(bench.release(1));
    assert_eq!(assembled.volume.shape(), [5, 4, 6]);
    assert_eq!(assembled.set_aside.len(), 1);
    assert_eq!(assembled.set_aside[0].reason, Reason::Localizer);
}

#[test]
fn slices_with_different_rescale_become_real_values_in_any_order() {
    let images: Vec<Image> = (0..4).map(|n| Image { intercept: -0.1 * n as f64, ..image("a", n) }).collect();
    let mut seen: Vec<Vec<f32>> = Vec::new();
    for order in [[0, 1, 2, 3], [3, 1, 0, 2]] {
        let mut bench = Bench::new();
        order.iter().for_each(|n| bench.add_all(1, &images[*n..*n + 1]));
        let assembled = volume(bench.release(1));
        assert_eq!(assembled.volume.voxel_type(), VoxelType::F32);
        assert_eq!(assembled.volume.rescale(), Rescale::IDENTITY);
        seen.push(values(&assembled.volume));
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0][3], (30.0 - 0.1 * 3.0) as f32);
}

#[test]
fn too_many_frames_and_too_many_series_are_refused() {
    let mut bench = Bench::new();
    bench.assembler = Assembler::new(bench.spool.path(), Limits { slices_max: 3, series_open_max: 1, ..Limits::default() });
    bench.add_all(1, &(0..3).map(|n| image("a", n)).collect::<Vec<_>>());
    assert!(matches!(bench.add(1, &image("a", 3)), Err(AddError::Rejected(r)) if r.code == RejectionCode::TooLarge));
    assert!(matches!(bench.add(1, &image("b", 0)), Err(AddError::Busy(1))));
}

fn folder(images: &[Image]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("deep")).expect("a folder");
    for (n, image) in images.iter().enumerate() {
        let name = format!("{}x{}", if n % 2 == 0 { "deep/" } else { "" }, (n * 7919) % 1000);
        std::fs::write(folder.path().join(name), image.file()).expect("it is written");
    }
    std::fs::write(folder.path().join("notes.txt"), "no image").expect("it is written");
    folder
}

#[test]
fn a_folder_gives_the_same_volume_as_a_stream() {
    let images: Vec<Image> = [3, 0, 6, 1, 5, 2, 4].into_iter().map(|n| image("a", n)).collect();
    let mut bench = Bench::new();
    bench.add_all(1, &images);
    let streamed = volume(bench.release(1)).volume;
    let folder = folder(&images);
    let mut found = scan(folder.path()).expect("it is read");
    assert_eq!((found.series.len(), found.others.len()), (1, 1));
    let loaded = found.series[0].load().expect("a volume");
    assert_eq!(loaded.volume.grid(), streamed.grid());
    assert_eq!(loaded.volume.rescale(), streamed.rescale());
    assert_eq!(values(&loaded.volume), values(&streamed));
    assert!(loaded.volume.is_contiguous());
}

#[test]
fn images_at_the_same_places_are_passes_of_a_series() {
    let at = |t: usize, n: usize| Image { z: n as f64, value: (100 * t + n) as i16, ..image("a", 10 * t + n) };
    let images: Vec<Image> = (0..3).flat_map(|t| (0..4).map(move |n| at(t, n))).collect();
    let folder = folder(&images);
    let mut found = scan(folder.path()).expect("it is read");
    let series = &mut found.series[0];
    assert!(matches!(
        series.arrange(),
        Err(FilesError::Rejected { rejection, .. }) if rejection.code == RejectionCode::ConflictingDuplicate
    ));
    let mut passes = series.passes();
    assert_eq!(passes.len(), 3);
    let loaded = passes[2].load().expect("a volume");
    assert_eq!(values(&loaded.volume), [200.0, 201.0, 202.0, 203.0].map(|v| v - 1024.0));
}

#[test]
fn a_gap_in_a_folder_is_filled_as_in_a_stream() {
    let images: Vec<Image> = [0, 1, 2, 4, 5].into_iter().map(|n| image("a", n)).collect();
    let folder = folder(&images);
    let loaded = scan(folder.path()).expect("it is read").series[0].load().expect("a volume");
    assert_eq!(loaded.arrangement.verdict.missing_slices, [3]);
    assert_eq!(values(&loaded.volume)[2..5], [-1004.0, -1024.0, -984.0]);
}
