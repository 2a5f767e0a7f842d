use std::io::Read;

use super::*;

fn packed(bytes: &[u8], pool: Option<&Pool>) -> Vec<u8> {
    let mut writer = GzipWriter::new(Vec::new(), pool).expect("memory");
    bytes.chunks(100_003).for_each(|part| writer.write_all(part).expect("memory"));
    writer.finish().expect("memory")
}

/// Numbers that look like chance and are always the same.
fn noise(n: usize) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(88_172_645_463_325_252u64), |x| {
        let x = x ^ (x << 13);
        let x = x ^ (x >> 7);
        Some(x ^ (x << 17))
    })
    .take(n)
}

/// Masks, scans, floats, noise, and counts so uneven that codes must be cut.
fn samples() -> Vec<(&'static str, Vec<u8>, f64)> {
    let scan = noise(300_000).flat_map(|r| (1000 + (r >> 60) as i16 - (r >> 40 & 15) as i16).to_le_bytes()).collect();
    let floats = noise(200_000).flat_map(|r| ((r >> 40) as f32 / 1e6 - 8.0).to_le_bytes()).collect();
    let mut fibonacci = Vec::new();
    let (mut a, mut b) = (1usize, 1usize);
    for symbol in 0..24u8 {
        fibonacci.extend(std::iter::repeat_n(symbol, a));
        (a, b) = (b, a + b);
    }
    let shuffle: Vec<u64> = noise(fibonacci.len()).collect();
    for n in (1..fibonacci.len()).rev() {
        fibonacci.swap(n, (shuffle[n] % (n as u64 + 1)) as usize);
    }
    let mask = (0..700_000).map(|n: usize| u8::from(n % 5000 < 700 && n / 5000 % 3 == 0)).collect();
    vec![
        ("nothing", Vec::new(), 1.0),
        ("one byte", vec![7], 1.0),
        ("three bytes", vec![1, 2, 1], 1.0),
        ("zeros", vec![0; 1_000_000], 0.006),
        ("one row over and over", (0..900_000u32).map(|n| (n % 512 * 7 % 251) as u8).collect(), 0.02),
        ("a mask", mask, 0.01),
        ("a scan", scan, 0.48),
        ("floats", floats, 0.95),
        ("noise", noise(250_000).map(|r| (r >> 32) as u8).collect(), 1.001),
        ("fibonacci", fibonacci, 0.4),
    ]
}

#[test]
fn what_is_packed_comes_back_in_one_member_by_two_readers() {
    for (name, bytes, share) in samples() {
        let gz = packed(&bytes, None);
        assert!(gz.len() as f64 <= share * bytes.len() as f64 + 40.0, "{name}: {} of {}", gz.len(), bytes.len());
        // A decoder of one member only.
        let mut decoder = flate2::read::GzDecoder::new(&gz[..]);
        let mut back = Vec::new();
        decoder.read_to_end(&mut back).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(back == bytes, "{name}");
        let mut back = vec![0; bytes.len()];
        libdeflater::Decompressor::new().gzip_decompress(&gz, &mut back).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(back == bytes, "{name}");
    }
}

#[test]
fn the_file_does_not_depend_on_the_threads() {
    let pools = [Pool::new(2), Pool::new(5)];
    for (name, bytes, _) in samples() {
        let alone = packed(&bytes, None);
        assert!(pools.iter().all(|pool| packed(&bytes, Some(pool)) == alone), "{name}");
    }
}

#[test]
fn every_length_and_distance_has_its_code() {
    for length in 3..=258u16 {
        let (base, extra) = LENGTHS[usize::from(LENGTH_CODES[usize::from(length)])];
        assert!(length >= base && (length - base) < 1 << extra, "{length}");
    }
    for distance in 1..=32_768u16 {
        let (base, extra) = DISTANCES[distance_code(distance)];
        assert!(distance >= base && u32::from(distance - base) < 1 << extra, "{distance}");
    }
}

#[test]
fn cut_codes_fill_their_room_exactly() {
    let mut counts = [0u32; 40];
    let (mut a, mut b) = (1, 1);
    for count in &mut counts {
        *count = a;
        (a, b) = (b, a + b);
    }
    for most in [7, CODE_BITS_MAX] {
        let mut lengths = [0; 40];
        code_lengths(&counts, most, &mut lengths);
        let taken: usize = lengths.iter().map(|l| 1 << (most - usize::from(*l))).sum();
        assert_eq!(taken, 1 << most);
        assert!(lengths.windows(2).all(|pair| pair[0] >= pair[1]), "a rarer symbol has no shorter code");
    }
}
