//! Golden blobs are scikit-image 0.26's on the same image.

use super::*;

/// Six bright spots of several sizes and one in a corner, over a pattern that looks like noise.
fn spots() -> Array3<f32> {
    const SPOTS: [(f64, f64, f64, f64, f64); 7] = [
        (12.0, 20.0, 24.0, 3.0, 1.0),
        (6.0, 8.0, 10.0, 1.5, 0.8),
        (17.0, 30.0, 38.0, 2.2, 0.9),
        (10.0, 31.0, 9.0, 1.2, 0.7),
        (19.0, 9.0, 33.0, 4.0, 0.6),
        (12.0, 20.0, 30.0, 1.2, 0.6),
        (2.0, 36.0, 44.0, 2.0, 0.5),
    ];
    Array3::from_shape_fn((24, 40, 48), |(k, j, i)| {
        let pattern = 0.02 * ((k * 7919 + j * 10473 + i * 12997) % 1000) as f64 / 1000.0;
        let spots: f64 = SPOTS
            .iter()
            .map(|(z, y, x, s, a)| {
                let d2 = (k as f64 - z).powi(2) + (j as f64 - y).powi(2) + (i as f64 - x).powi(2);
                a * (-d2 / (2.0 * s * s)).exp()
            })
            .sum();
        (pattern + spots) as f32
    })
}

fn isotropic() -> Spacing {
    Spacing::new([1.0; 3]).unwrap()
}

fn search(threshold: f64) -> Search {
    Search { sigma_max: 8.0, threshold, ..Search::default() }
}

fn log_search(scales: usize, logarithmic: bool) -> Search {
    Search { method: Method::Laplacian { scales, logarithmic }, sigma_max: 5.0, threshold: 0.1, ..Search::default() }
}

fn check(blobs: &[Blob], expected: &[([usize; 3], f64)]) {
    let found: Vec<_> = blobs.iter().map(|b| (b.peak_voxel, (b.sigma * 1e4).round() / 1e4)).collect();
    assert_eq!(found, expected);
}

#[test]
fn differences_of_gaussians_find_the_blobs_of_scikit_image_in_its_order() {
    let pool = Pool::new(2);
    let image = spots();
    let golden = [
        ([12, 20, 24], 1.6),
        ([17, 30, 38], 1.6),
        ([6, 8, 10], 1.0),
        ([10, 31, 9], 1.0),
        ([12, 20, 30], 1.0),
        ([19, 9, 33], 2.56),
        ([0, 39, 47], 4.096),
    ];
    check(&find(image.view(), isotropic(), &search(0.05), &pool).unwrap(), &golden);
    // Without pruning the corner's smaller blob stays as well.
    let all = Search { overlap: 1.0, ..search(0.05) };
    assert_eq!(find(image.view(), isotropic(), &all, &pool).unwrap()[6].peak_voxel, [2, 36, 44]);
    let inner = Search { border_voxels: 5, ..search(0.05) };
    check(&find(image.view(), isotropic(), &inner, &pool).unwrap(), &golden[..5]);
}

#[test]
fn laplacians_of_gaussians_find_the_blobs_of_scikit_image() {
    let blobs = find(spots().view(), isotropic(), &log_search(9, false), &Pool::new(2)).unwrap();
    let golden = [
        ([12, 20, 24], 2.5),
        ([17, 30, 38], 2.0),
        ([6, 8, 10], 1.0),
        ([10, 31, 9], 1.0),
        ([12, 20, 30], 1.0),
        ([19, 9, 33], 3.0),
        ([0, 39, 47], 5.0),
    ];
    check(&blobs, &golden);
}

#[test]
fn one_slice_is_searched_in_two_dimensions() {
    let pool = Pool::new(1);
    let image = spots();
    let slice = image.slice(ndarray::s![12..13, .., ..]);
    let dog = find(slice, isotropic(), &Search { overlap: 0.3, ..search(0.05) }, &pool).unwrap();
    check(&dog, &[([0, 20, 24], 2.56), ([0, 20, 30], 1.0), ([0, 31, 9], 1.0)]);
    assert!((dog[0].radius_mm - 2.56 * 2f64.sqrt()).abs() < 1e-9);
    let log = find(slice, isotropic(), &Search { overlap: 0.3, ..log_search(9, true) }, &pool).unwrap();
    check(&log, &[([0, 20, 24], 3.3437), ([0, 20, 30], 1.2228)]);
}

/// A ball of Gaussian profile at a place between voxels, in millimetres.
fn ball(spacing: [f64; 3], shape: [usize; 3], centre_mm: [f64; 3], sigma_mm: f64) -> Array3<f32> {
    Array3::from_shape_fn(shape, |(k, j, i)| {
        let at = [k, j, i];
        let d2: f64 = (0..3).map(|a| (at[a] as f64 * spacing[a] - centre_mm[a]).powi(2)).sum();
        (-d2 / (2.0 * sigma_mm * sigma_mm)).exp() as f32
    })
}

#[test]
fn centres_lie_within_a_tenth_of_a_voxel_and_radii_are_millimetres_whatever_the_spacing() {
    let spacing = [2.5, 0.8, 1.0];
    let centre_mm = [30.8, 24.3, 31.4];
    let image = ball(spacing, [24, 60, 64], centre_mm, 5.0);
    for (unit, factor) in [(Unit::Voxel, 0.8), (Unit::Millimetre, 1.0)] {
        let search = Search {
            method: Method::Laplacian { scales: 21, logarithmic: false },
            sigma_min: 2.0 / factor,
            sigma_max: 10.0 / factor,
            unit,
            threshold: 0.2,
            ..Search::default()
        };
        let blobs = find(image.view(), Spacing::new(spacing).unwrap(), &search, &Pool::new(2)).unwrap();
        assert_eq!(blobs.len(), 1);
        for a in 0..3 {
            assert!((blobs[0].centre_voxel[a] - centre_mm[a] / spacing[a]).abs() < 0.1, "{:?}", blobs[0]);
            assert!((blobs[0].sigma_mm[a] - blobs[0].sigma * factor).abs() < 1e-9);
        }
        // Scale space of a Gaussian ball peaks at sigma * sqrt(2/3) in three dimensions (Lindeberg 1998).
        assert!((blobs[0].radius_mm - 5.0 * (2f64 / 3.0).sqrt() * 3f64.sqrt()).abs() < 0.5, "{:?}", blobs[0]);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let image = spots();
    let one = find(image.view(), isotropic(), &search(0.01), &Pool::new(1)).unwrap();
    assert_eq!(one, find(image.view(), isotropic(), &search(0.01), &Pool::new(3)).unwrap());
}

#[test]
fn nothing_is_found_in_nothing_and_bad_numbers_are_refused() {
    let pool = Pool::new(1);
    let flat = Array3::from_elem((5, 6, 7), 3.0f32);
    assert_eq!(find(flat.view(), isotropic(), &search(0.001), &pool).unwrap(), []);
    let mut holes = flat.clone();
    holes[[1, 2, 3]] = f32::NAN;
    assert!(matches!(find(holes.view(), isotropic(), &search(0.1), &pool), Err(BlobError::NotFinite(1))));
    for bad in [
        Search { sigma_min: 0.0, ..search(0.1) },
        Search { sigma_max: 0.5, ..search(0.1) },
        Search { sigma_max: f64::NAN, ..search(0.1) },
        Search { threshold: f64::NAN, ..search(0.1) },
        Search { overlap: 1.5, ..search(0.1) },
        Search { method: Method::Difference { ratio: 1.0 }, ..search(0.1) },
        Search { method: Method::Difference { ratio: 1.0001 }, ..search(0.1) },
        Search { method: Method::Laplacian { scales: 0, logarithmic: true }, ..search(0.1) },
    ] {
        assert!(matches!(find(flat.view(), isotropic(), &bad, &pool), Err(BlobError::Search { .. })), "{bad:?}");
    }
    let huge = Search { unit: Unit::Millimetre, sigma_min: 1e5, sigma_max: 1e6, ..search(0.1) };
    assert!(matches!(find(flat.view(), isotropic(), &huge, &pool), Err(BlobError::Smooth(_))));
}
