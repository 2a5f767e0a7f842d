use ndarray::Array3;

use super::*;
use crate::geometry::{Grid, Spacing, norm};
use crate::imaging::resample::{Interpolation, resample};

/// A head of ellipsoids with soft edges, in patient space; values of two contrasts.
fn phantom(p: [f64; 3], contrast: usize) -> f32 {
    const PARTS: [([f64; 3], [f64; 3], [f64; 2]); 8] = [
        ([0.0, 0.0, 0.0], [42.0, 50.0, 38.0], [300.0, 500.0]),
        ([0.0, 2.0, 0.0], [36.0, 43.0, 32.0], [400.0, -250.0]),
        ([17.0, -14.0, 8.0], [13.0, 9.0, 10.0], [-500.0, 300.0]),
        ([-20.0, 9.0, -6.0], [8.0, 14.0, 9.0], [-250.0, 350.0]),
        ([4.0, 24.0, 12.0], [12.0, 8.0, 8.0], [300.0, -100.0]),
        ([-10.0, -22.0, -14.0], [10.0, 10.0, 7.0], [350.0, 250.0]),
        ([15.0, 12.0, -16.0], [8.0, 9.0, 9.0], [-300.0, 400.0]),
        ([-13.0, 0.0, 20.0], [9.0, 11.0, 8.0], [450.0, -150.0]),
    ];
    let part = |(c, r, v): &([f64; 3], [f64; 3], [f64; 2])| {
        let far = norm(std::array::from_fn(|n| (p[n] - c[n]) / r[n]));
        // An edge about 3 mm wide.
        v[contrast] / (1.0 + ((far - 1.0) * r[2] / 0.8).min(50.0).exp())
    };
    PARTS.iter().map(part).sum::<f64>() as f32
}

fn grid(shape: [usize; 3], spacing: [f64; 3]) -> Grid {
    let spacing = Spacing::new(spacing).unwrap();
    let s = spacing.zyx_mm();
    let origin = [2, 1, 0].map(|c| -s[c] * (shape[c] - 1) as f64 / 2.0);
    Grid { shape, affine: Affine::axial(spacing, origin) }
}

fn image_of(grid: crate::geometry::Grid, f: impl Fn([f64; 3]) -> f32) -> Array3<f32> {
    let [z, y, x] = grid.shape;
    Array3::from_shape_fn((z, y, x), |(k, j, i)| f(grid.affine.kji_to_lps([k as f64, j as f64, i as f64])))
}

/// Fixed and moving phantom, the moving one displaced by `truth`.
fn pair(truth: &Transform, contrasts: [usize; 2]) -> [(Array3<f32>, Affine); 2] {
    let fixed_grid = grid([28, 56, 60], [4.0, 2.0, 2.0]);
    let moving_grid = grid([30, 60, 64], [3.9, 2.1, 2.0]);
    let moving = moving_grid;
    // moving(truth(x)) = fixed(x): evaluate the phantom at the inverse, by fixed-point iteration.
    let inverse = |y: [f64; 3]| {
        let mut x = y;
        for _ in 0..60 {
            let back = truth.apply(x);
            x = std::array::from_fn(|c| x[c] - 0.8 * (back[c] - y[c]));
        }
        x
    };
    [
        (image_of(fixed_grid, |p| phantom(p, contrasts[0])), fixed_grid.affine),
        (image_of(moving, |p| phantom(inverse(p), contrasts[1])), moving.affine),
    ]
}

fn as_image((voxels, affine): &(Array3<f32>, Affine)) -> Image<'_> {
    Image { voxels: voxels.view(), affine: *affine, mask: None }
}

/// Greatest distance over places in the head between where two transforms take them.
fn target_error(a: &Transform, b: &Transform) -> f64 {
    let places = [[0.0; 3], [30.0, 0.0, 0.0], [-30.0, 10.0, 0.0], [0.0, 30.0, -20.0], [0.0, -30.0, 20.0], [10.0, 0.0, 30.0]];
    places.iter().map(|p| norm(sub(a.apply(*p), b.apply(*p)))).fold(0.0, f64::max)
}

fn truth() -> Transform {
    Transform::rigid([0.0; 3], [0.11, -0.08, 0.15], [6.0, -4.0, 5.0])
}

fn run(images: &[(Array3<f32>, Affine); 2], settings: &Settings, threads: usize) -> Result<Outcome, RegistrationError> {
    register(&as_image(&images[0]), &as_image(&images[1]), settings, &Pool::new(threads), |_| ())
}

#[test]
fn a_known_rigid_offset_is_recovered_between_two_contrasts() {
    let images = pair(&truth(), [0, 1]);
    let metric = Metric::Mattes { bins: 32 };
    for sampling in [Sampling::All, Sampling::Regular { fraction: 0.4 }, Sampling::Random { fraction: 0.4, seed: 1 }] {
        let outcome = run(&images, &Settings { metric, sampling, ..Settings::default() }, 2).unwrap();
        let error = target_error(&outcome.transform, &truth());
        // Half of a voxel, whose sides are 2, 2 and 4 mm.
        assert!(error < 1.0, "{sampling:?}: {error} mm after {} steps", outcome.iterations);
    }
}

#[test]
fn every_metric_and_kind_finds_its_way_within_one_contrast() {
    let shift = {
        let mut t = Transform::identity(Kind::Translation, [0.0; 3]);
        t.set_shift([5.0, -7.0, 4.0]);
        t
    };
    let similarity = Transform::identity(Kind::Similarity, [0.0; 3])
        .with_parameters(vec![0.05, -0.04, 0.06, 4.0, -3.0, 5.0, 1.06]);
    let affine = Transform::identity(Kind::Affine, [0.0; 3])
        .with_parameters(vec![1.05, 0.04, 0.0, -0.03, 0.96, 0.05, 0.02, 0.0, 1.04, 3.0, -4.0, 2.0]);
    for truth in [shift, truth(), similarity, affine] {
        let images = pair(&truth, [0, 0]);
        for metric in [Metric::Mattes { bins: 32 }, Metric::MeanSquares, Metric::Correlation] {
            let settings = Settings { kind: truth.kind(), metric, ..Settings::default() };
            let outcome = run(&images, &settings, 2).unwrap();
            let error = target_error(&outcome.transform, &truth);
            let limit = if matches!(metric, Metric::Mattes { .. }) { 1.0 } else { 0.5 };
            assert!(error < limit, "{:?} {metric:?}: {error} mm, {:?}", truth.kind(), outcome.stop);
        }
    }
}

#[test]
fn plain_gradient_steps_get_there_too_only_later() {
    let images = pair(&truth(), [0, 1]);
    let regular = Optimiser::RegularStep { first_step_mm: 0.0, least_step_mm: 0.005 };
    for optimiser in [regular, Optimiser::Descent { rate: 1.0 }] {
        let outcome = run(&images, &Settings { optimiser, ..Settings::default() }, 2).unwrap();
        let error = target_error(&outcome.transform, &truth());
        let before = target_error(&Transform::identity(Kind::Rigid, [0.0; 3]), &truth());
        assert!(error < 0.5 * before, "{optimiser:?}: {error} mm of {before}");
    }
}

#[test]
fn gradients_are_the_derivatives_of_the_values() {
    let images = pair(&truth(), [0, 1]);
    let pool = Pool::new(1);
    let moving = Plain::new(images[1].0.view(), images[1].1);
    for metric in [Metric::Mattes { bins: 40 }, Metric::MeanSquares, Metric::Correlation] {
        for kind in [Kind::Translation, Kind::Rigid, Kind::Similarity, Kind::Affine] {
            let fixed = Plain::new(images[0].0.view(), images[0].1);
            let mut mask = Array3::<u8>::zeros(images[0].0.dim());
            // Well inside, so that no sample leaves the moving image between the two values.
            mask.slice_mut(ndarray::s![8..20, 16..40, 16..44]).fill(1);
            let samples = Samples::draw(&fixed, Some(mask.view()), Sampling::Random { fraction: 1.0, seed: 3 }, 1).unwrap();
            let mut comparison = Comparison::new(metric, images[0].1, samples, &moving, None).unwrap();
            let here = Transform::identity(kind, [3.0, -2.0, 1.0]);
            let nudge: Vec<f64> = (0..kind.parameters()).map(|n| 0.01 * ((n * 7 % 5) as f64 - 2.0)).collect();
            let here = here.with_parameters(here.parameters().iter().zip(nudge).map(|(p, n)| p + n).collect());
            let analytic = comparison.evaluate(&here, true, &pool).unwrap().gradient;
            let largest = analytic.iter().fold(0.0f64, |m, g| m.max(g.abs()));
            for n in 0..kind.parameters() {
                let turns = kind != Kind::Translation && n < kind.parameters() - 3 || kind == Kind::Similarity && n == 6;
                let delta = if turns { 2e-4 } else { 1e-2 };
                let mut at = |sign: f64| {
                    let mut p = here.parameters().to_vec();
                    p[n] += sign * delta;
                    comparison.evaluate(&here.with_parameters(p), false, &pool).unwrap().value
                };
                let numeric = (at(1.0) - at(-1.0)) / (2.0 * delta);
                // Differences straddle the creases of linear interpolation; the chain rule does not.
                let tolerance = 0.02 * analytic[n].abs().max(numeric.abs()) + 1e-2 * largest;
                assert!(
                    (numeric - analytic[n]).abs() < tolerance,
                    "{metric:?} {kind:?} parameter {n}: {numeric} by differences, {} by the chain rule", analytic[n]
                );
            }
        }
    }
}

#[test]
fn the_result_has_the_same_bits_for_any_number_of_threads() {
    let images = pair(&truth(), [0, 1]);
    let settings = Settings { steps: 12, ..Settings::default() };
    let one = run(&images, &settings, 1).unwrap();
    for threads in [2, 8] {
        assert!(one == run(&images, &settings, threads).unwrap());
    }
}

#[test]
fn images_that_cannot_be_compared_are_refused_with_the_reason() {
    let images = pair(&truth(), [0, 1]);
    let settings = Settings { steps: 3, ..Settings::default() };
    let far = images[1].1.shifted([4000.0, 0.0, 0.0]);
    let apart = Settings { start: Start::PatientSpace, ..settings.clone() };
    let error = run(&[images[0].clone(), (images[1].0.clone(), far)], &apart, 1).unwrap_err();
    assert!(matches!(error, RegistrationError::NoOverlap { .. }), "{error}");
    assert!(run(&[images[0].clone(), (images[1].0.clone(), far)], &settings, 1).is_ok(), "middles laid together meet");

    let mut holed = images.clone();
    holed[1].0[[3, 4, 5]] = f32::NAN;
    let error = run(&holed, &settings, 1).unwrap_err();
    assert!(matches!(error, RegistrationError::NotFinite { which: "moving", voxels: 1, first: [3, 4, 5] }));

    let flat = [images[0].clone(), (Array3::from_elem((9, 9, 9), 7.0), images[1].1)];
    assert!(matches!(run(&flat, &settings, 1).unwrap_err(), RegistrationError::Flat { which: "moving" }));

    let plane = [(Array3::from_elem((1, 9, 9), 7.0), images[0].1), images[1].clone()];
    assert!(matches!(run(&plane, &settings, 1).unwrap_err(), RegistrationError::NotAVolume { which: "fixed", shape: [1, 9, 9] }));

    let many = Settings { metric: Metric::Mattes { bins: 100_000 }, ..settings };
    assert!(matches!(run(&images, &many, 1).unwrap_err(), RegistrationError::Setting(_)));
}

#[test]
fn masks_keep_what_does_not_belong_out_of_the_comparison() {
    let mut images = pair(&truth(), [0, 0]);
    // A bright slab that is not part of the head, in the fixed image alone.
    images[0].0.slice_mut(ndarray::s![.., 0..14, ..]).fill(3000.0);
    let mut mask = Array3::<u8>::ones(images[0].0.dim());
    mask.slice_mut(ndarray::s![.., 0..14, ..]).fill(0);
    let fixed = Image { mask: Some(mask.view()), ..as_image(&images[0]) };
    let settings = Settings { metric: Metric::MeanSquares, ..Settings::default() };
    let outcome = register(&fixed, &as_image(&images[1]), &settings, &Pool::new(2), |_| ()).unwrap();
    assert!(target_error(&outcome.transform, &truth()) < 0.5);
}

#[test]
fn transforms_survive_itk_files_and_others_are_refused() {
    let similarity = Transform::identity(Kind::Similarity, [1.5, 2.0, -3.0])
        .with_parameters(vec![0.1, -0.2, 0.05, 4.0, -3.0, 5.0, 1.06]);
    let affine = Transform::identity(Kind::Affine, [1.0, 2.0, 3.0]);
    for transform in [truth(), similarity, affine, Transform::identity(Kind::Translation, [0.0; 3])] {
        assert_eq!(Transform::from_tfm(&transform.to_tfm()).unwrap(), transform);
    }
    let head = "#Insight Transform File V1.0\n#Transform 0\n";
    let zyx = format!("{head}Transform: Euler3DTransform_double_3_3\nParameters: 0.1 0.2 0.3 1 2 3\nFixedParameters: 4 5 6 1\n");
    let read = Transform::from_tfm(&zyx).unwrap();
    // Rz Ry Rx, first column.
    let (c, s) = (f64::cos, f64::sin);
    assert!((read.matrix()[0][0] - c(0.3) * c(0.2)).abs() < 1e-12 && (read.matrix()[2][0] + s(0.2)).abs() < 1e-12);
    let of = |text: &str| Transform::from_tfm(text).unwrap_err();
    assert_eq!(of("Transform: x"), BadTransform::Header);
    assert!(matches!(of(&format!("{head}Transform: BSplineTransform_double_3_3\n")), BadTransform::Kind(_)));
    assert!(matches!(of(&zyx.replace("0.3", "NaN")), BadTransform::Numbers(..)));
    assert!(matches!(of(&format!("{zyx}{}", &zyx[head.len()..])), BadTransform::Count(2)));
}

#[test]
fn resampling_through_the_transform_brings_the_moving_image_onto_the_fixed_one() {
    let images = pair(&truth(), [0, 0]);
    let (nz, ny, nx) = images[0].0.dim();
    let onto = Grid { shape: [nz, ny, nx], affine: images[0].1 };
    let error = |interpolation, transform: &Transform| {
        let carried = Grid { affine: transform.carry(&onto.affine).unwrap(), ..onto };
        let out = resample(images[1].0.view(), &images[1].1, &carried, interpolation, 0.0, &Pool::new(2)).unwrap();
        let inner = ndarray::s![6..22, 12..44, 12..48];
        let difference = &out.slice(inner) - &images[0].0.slice(inner);
        f64::from(difference.mapv(f32::abs).mean().unwrap())
    };
    let [nearest, linear, cubic] =
        [Interpolation::Nearest, Interpolation::Linear, Interpolation::Cubic].map(|i| error(i, &truth()));
    assert!(cubic < linear && linear < nearest && nearest < 30.0, "{cubic} {linear} {nearest}");
    assert!(error(Interpolation::Linear, &Transform::identity(Kind::Rigid, [0.0; 3])) > 5.0 * linear);
}
