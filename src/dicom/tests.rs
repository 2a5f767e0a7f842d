use super::build::{SeriesTemplate, SliceTemplate, decimal_string, sop_instance};
use super::*;
use crate::geometry::Plane;
use crate::study::{Modality, RejectionCode, Uid};
use crate::volume::{Rescale, VoxelType};

const AXIAL: [f64; 6] = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];

fn template(voxel: VoxelType, bits_stored: u16) -> SeriesTemplate {
    SeriesTemplate {
        modality: Modality::Ct,
        study: Uid::derived(b"study"),
        series: Uid::derived(b"series"),
        frame_of_reference: Uid::derived(b"frame"),
        patient_name: "Test^Phantom".into(),
        patient_id: "42".into(),
        description: "a phantom".into(),
        date_time: ["20260101".into(), "120000".into()],
        series_number: 3,
        size: [6, 10],
        voxel,
        bits_stored,
        thickness_mm: 2.5,
        window: Some([-600.0, 1600.0]),
        regions: Vec::new(),
        more: Vec::new(),
    }
}

fn slice(number: usize, pixels: &[u8]) -> SliceTemplate<'_> {
    let plane = Plane::new([-1.5, 2.25, 2.5 * number as f64], AXIAL, [0.7, 0.8]).expect("a plane");
    let rescale = Rescale { slope: 1.0, intercept: -1024.0 };
    SliceTemplate { number, plane: Some(plane), rescale, image_type: "ORIGINAL\\PRIMARY\\AXIAL", pixels }
}

/// Runs, ramps and jumps, so that every branch of a run-length coder is taken.
fn words(low: i32, high: i32) -> Vec<u8> {
    let value = |n: i32| match n % 7 {
        0..=4 => low,
        5 => high,
        _ => low + (n * 37) % (high - low),
    };
    (0..60).flat_map(|n| (value(n) as i16).to_le_bytes()).collect()
}

fn writable() -> impl Iterator<Item = &'static TransferSyntax> {
    let encapsulated = "1.2.840.10008.1.2.1.98";
    let codec = move |s: &&TransferSyntax| matches!(s.codec, Codec::Native | Codec::Rle) && s.uid != encapsulated;
    decodable_transfer_syntaxes().iter().filter(codec)
}

#[test]
fn pixels_come_back_from_every_syntax_we_write() {
    for (voxel, bits, low, high) in [
        (VoxelType::I16, 16, -2048, 3000),
        (VoxelType::I16, 12, -2048, 2047),
        (VoxelType::U16, 12, 0, 4095),
        (VoxelType::U16, 16, 0, 32767),
    ] {
        let pixels = words(low, high);
        for syntax in writable() {
            let file = template(voxel, bits).image(&slice(1, &pixels), syntax).expect("it is built");
            let instance = Instance::parse(&file).expect("it is read");
            let mut scratch = Vec::new();
            assert_eq!(instance.decode_frame(0, &mut scratch).expect("it decodes"), pixels, "{}", syntax.name);
            assert_eq!(instance.header.pixel.voxel_type(), voxel);
            assert_eq!(instance.header.transfer_syntax, syntax);
        }
    }
    let bytes: Vec<u8> = (0..60).map(|n| if n % 5 == 0 { 255 } else { n }).collect();
    for syntax in writable() {
        let file = template(VoxelType::U8, 8).image(&slice(1, &bytes), syntax).expect("it is built");
        let instance = Instance::parse(&file).expect("it is read");
        assert_eq!(instance.decode_frame(0, &mut Vec::new()).expect("it decodes"), bytes, "{}", syntax.name);
    }
}

#[test]
fn the_header_says_what_the_template_said() {
    let pixels = words(0, 100);
    for syntax in writable() {
        let t = template(VoxelType::I16, 16);
        let file = t.image(&slice(4, &pixels), syntax).expect("it is built");
        let instance = Instance::parse(&file).expect("it is read");
        let h = &instance.header;
        assert_eq!((&h.series, &h.study, &h.frame_of_reference), (&t.series, &t.study, &Some(t.frame_of_reference)));
        assert_eq!(h.sop_instance, sop_instance(&t.series, 4));
        assert_eq!((h.modality, h.rows, h.columns, h.instance_number), (Modality::Ct, 6, 10, Some(4)));
        let frame = &h.frames[0];
        assert_eq!(frame.plane, slice(4, &pixels).plane);
        assert_eq!(frame.rescale, Rescale { slope: 1.0, intercept: -1024.0 });
        assert_eq!((frame.window, frame.slice_thickness_mm), (Some([-600.0, 1600.0]), Some(2.5)));
        assert_eq!(instance.text(tags::PATIENT_NAME).as_deref(), Some("Test^Phantom"));
        let start = Header::parse_start(&file[..file.len().min(2000)]).expect("no mistake in it");
        assert_eq!(start.as_ref(), (!syntax.deflated).then_some(h));
    }
}

#[test]
fn bits_above_bits_stored_are_not_part_of_the_value() {
    let mut pixels = words(0, 2047);
    // An overlay in the upper bits, as old scanners kept it.
    pixels.chunks_exact_mut(2).step_by(3).for_each(|b| b[1] |= 0xF0);
    let clean: Vec<u8> = pixels.chunks_exact(2).flat_map(|b| [b[0], b[1] & 0x0F]).collect();
    for syntax in writable() {
        let file = template(VoxelType::U16, 12).image(&slice(1, &pixels), syntax).expect("it is built");
        let instance = Instance::parse(&file).expect("it is read");
        assert_eq!(instance.decode_frame(0, &mut Vec::new()).expect("it decodes"), clean);
    }
}

#[test]
fn float_pixels_that_are_no_numbers_are_refused_and_the_others_are_read() {
    let parts = |value: f32| {
        let mut file = file::head(&Uid::derived(b"class"), &Uid::derived(b"sop"), &Uid::parse("1.2.840.10008.1.2.1").unwrap());
        for (group, element) in [(8u8, 0x16u8), (8, 0x18), (0x20, 0xd), (0x20, 0xe)] {
            file.extend_from_slice(&[group, 0, element, 0, b'U', b'I', 6, 0]);
            file.extend_from_slice(b"1.2.3\0");
        }
        for (low, high, number) in [(0x10, 0, 1), (0x11, 0, 2), (0, 1, 32)] {
            file.extend_from_slice(&[0x28, 0, low, high, b'U', b'S', 2, 0, number, 0]);
        }
        file.extend_from_slice(&[0xe0, 0x7f, 8, 0, b'O', b'F', 0, 0, 8, 0, 0, 0]);
        file.extend_from_slice(&[1.5f32.to_le_bytes(), value.to_le_bytes()].concat());
        file
    };
    let decode = |value: f32| {
        let file = parts(value);
        Instance::parse(&file).expect("its header is sound").decode_frame(0, &mut Vec::new()).map(<[u8]>::len)
    };
    assert_eq!(decode(-1000.0), Ok(8));
    for value in [f32::NEG_INFINITY, f32::NAN] {
        assert_eq!(decode(value).unwrap_err().code, RejectionCode::Malformed);
    }
}

#[test]
fn a_rescale_that_is_no_number_is_not_taken_for_none() {
    let file = template(VoxelType::I16, 16).image(&slice(1, &words(0, 99)), TransferSyntax::find("1.2.840.10008.1.2.1").unwrap());
    let mut file = file.expect("it is built");
    let at = file.windows(6).position(|w| w == [0x28, 0, 0x52, 0x10, b'D', b'S']).expect("an intercept");
    file[at + 8..at + 11].copy_from_slice(b"nan");
    let end = at + 8 + usize::from(file[at + 6]);
    file[at + 11..end].fill(b' ');
    assert_eq!(Instance::parse(&file).unwrap_err().code, RejectionCode::Malformed);
}

#[test]
fn an_enhanced_image_gives_each_frame_its_place_and_pixels() {
    let frames: Vec<Vec<u8>> = (0..5).map(|n| words(n * 100, n * 100 + 50)).collect();
    let slices: Vec<_> = frames.iter().enumerate().map(|(n, pixels)| slice(n, pixels)).collect();
    for syntax in writable() {
        let file = template(VoxelType::I16, 16).multi_frame(&slices, syntax).expect("it is built");
        let instance = Instance::parse(&file).expect("it is read");
        assert_eq!(instance.header.frames.len(), 5);
        for (n, pixels) in frames.iter().enumerate() {
            assert_eq!(instance.header.frames[n].plane, slice(n, pixels).plane);
            assert_eq!(instance.decode_frame(n, &mut Vec::new()).expect("it decodes"), pixels, "{}", syntax.name);
        }
    }
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let pixels = words(0, 2047);
    for syntax in writable() {
        let file = template(VoxelType::U16, 16).image(&slice(1, &pixels), syntax).expect("it is built");
        // The last bytes may be padding or a delimiter that nobody needs.
        for length in 0..file.len() - 10 {
            if let Ok(instance) = Instance::parse(&file[..length]) {
                instance.decode_frame(0, &mut Vec::new()).expect_err("the pixels are cut");
            }
        }
    }
}

#[test]
fn flipped_bits_never_panic_and_never_grow() {
    let pixels = words(-500, 2047);
    let mut seed = 12345u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let mut answered = 0;
    for syntax in writable() {
        let one = template(VoxelType::I16, 16).image(&slice(1, &pixels), syntax).expect("it is built");
        let many = template(VoxelType::I16, 16)
            .multi_frame(&[slice(1, &pixels), slice(2, &pixels)], syntax)
            .expect("it is built");
        for file in [one, many] {
            for _ in 0..400 {
                let mut hurt = file.clone();
                for _ in 0..=random(3) {
                    let at = random(hurt.len());
                    hurt[at] ^= 1 << random(8);
                }
                match Instance::parse(&hurt) {
                    Err(rejection) => assert!(!rejection.text.is_empty()),
                    Ok(instance) => {
                        let bytes = instance.header.frame_bytes();
                        if let Ok(frame) = instance.decode_frame(0, &mut Vec::new()) {
                            assert_eq!(frame.len(), bytes);
                        }
                    }
                }
                answered += 1;
            }
        }
    }
    assert_eq!(answered, 4000);
}

#[test]
fn what_is_no_image_is_refused_with_its_reason() {
    let code = |bytes: &[u8]| Instance::parse(bytes).expect_err("no image").code;
    assert_eq!(code(b""), RejectionCode::Malformed);
    assert_eq!(code(&[0; 132]), RejectionCode::Malformed);
    assert_eq!(code(b"This is a text file, and not a short one, for it goes on for a while."), RejectionCode::Malformed);
    let pixels = words(0, 100);
    let file = template(VoxelType::U16, 16).image(&slice(1, &pixels), &decodable_transfer_syntaxes()[0]).expect("built");
    let mut other_syntax = file.clone();
    let at = file.windows(19).position(|w| w == b"1.2.840.10008.1.2.1").expect("its syntax");
    other_syntax[at + 18] = b'9';
    assert_eq!(code(&other_syntax), RejectionCode::Unsupported);
    let without_pixels = &file[..file.len() - pixels.len() - 12];
    assert_eq!(code(without_pixels), RejectionCode::NoImages);
    // A length that lies: Rows as 60,000 while the pixels are 60.
    let mut lying = file.clone();
    let at = file.windows(6).position(|w| w == [0x28, 0, 0x10, 0, b'U', b'S']).expect("its rows");
    lying[at + 8..at + 10].copy_from_slice(&60_000u16.to_le_bytes());
    assert_eq!(code(&lying), RejectionCode::Malformed);
}

#[test]
fn sequences_that_nest_without_end_are_refused() {
    let mut data_set = Vec::new();
    for _ in 0..100_000 {
        data_set.extend_from_slice(&[0x40, 0, 0x60, 2, b'S', b'Q', 0, 0, 0xFF, 0xFF, 0xFF, 0xFF]);
        data_set.extend_from_slice(&[0xFE, 0xFF, 0, 0xE0, 0xFF, 0xFF, 0xFF, 0xFF]);
    }
    let rejection = Instance::parse_data_set(&data_set, "1.2.840.10008.1.2.1").expect_err("too deep");
    assert_eq!(rejection.code, RejectionCode::Malformed);
    assert!(rejection.text.contains("nest too deep"), "{rejection}");
}

#[test]
fn decimal_strings_fit_and_keep_their_digits() {
    for v in [0.0, 1.0, -0.703125, 1.0 / 3.0, -1e-7 / 3.0, 123_456_789.123_456_79, -987.654_321_012_345_6, 1e-300, -1e300 / 7.0] {
        let text = decimal_string(v);
        assert!(text.len() <= 16, "{text}");
        let back: f64 = text.parse().expect("a number");
        assert!((back - v).abs() <= v.abs() * 1e-8, "{v} became {text}");
    }
}

#[test]
fn contrast_agent_was_given_was_denied_or_is_not_spoken_of() {
    let agent = |text: &str| (tags::CONTRAST_BOLUS_AGENT, *b"LO", text.to_owned());
    let volume = |ml: &str| (tags::CONTRAST_BOLUS_VOLUME, *b"DS", ml.to_owned());
    for (want, more) in [
        (Some(true), vec![agent("Gadovist")]),
        (Some(true), vec![agent("MULTIHANCE & 15ML")]),
        (Some(false), vec![agent("NONE")]),
        (Some(false), vec![agent("No"), volume("0")]),
        (Some(true), vec![agent(""), volume("7.5")]),
        (None, vec![agent(""), volume("0")]),
        (None, vec![]),
    ] {
        let template = SeriesTemplate { modality: Modality::Mr, more, ..template(VoxelType::I16, 16) };
        let pixels = words(0, 1000);
        let syntax = TransferSyntax::find("1.2.840.10008.1.2.1").unwrap();
        let file = template.image(&slice(1, &pixels), syntax).unwrap();
        let mr = Instance::parse(&file).unwrap().header.mr.unwrap();
        assert_eq!(mr.contrast_agent, want, "{:?}", template.more);
        assert_eq!((mr.image_type.as_str(), mr.diffusion, mr.angiography), ("ORIGINAL\\PRIMARY\\AXIAL", false, false));
    }
}
