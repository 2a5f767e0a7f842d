//! Golden values are SimpleITK 2.5's on the same image.

use super::*;

fn pattern() -> Array3<f32> {
    Array3::from_shape_fn((7, 9, 11), |(k, j, i)| ((k * 7919 + j * 10473 + i * 12997) % 251) as f32 - 40.0)
}

/// Turned by 0.3 rad in the plane.
fn oblique() -> Grid {
    let (s, c) = 0.3f64.sin_cos();
    let affine =
        Affine::new([0.8 * c, 0.8 * s, 0.0], [-0.9 * s, 0.9 * c, 0.0], [0.0, 0.0, 2.5], [-10.0, 20.0, 5.0]).unwrap();
    Grid { shape: [7, 9, 11], affine }
}

fn check(found: &Array3<f32>, golden: &[([usize; 3], f32)], sum: f64, outside: usize) {
    for (at, value) in golden {
        assert!((found[*at] - value).abs() < 1e-3, "{at:?}: {} {value}", found[*at]);
    }
    let total: f64 = found.iter().map(|v| f64::from(*v)).sum();
    assert!((total - sum).abs() < 0.05, "{total} {sum}");
    assert_eq!(found.iter().filter(|v| **v == -1000.0).count(), outside);
}

#[test]
fn values_on_a_turned_grid_are_simpleitks() {
    let pool = Pool::new(2);
    let affine = Affine::axial(Spacing::new([1.9, 1.1, 0.7]).unwrap(), [-11.0, 21.0, 6.0]);
    let to = Grid { shape: [8, 10, 12], affine };
    let of = |how| resample(pattern().view(), &oblique().affine, &to, how, -1000.0, &pool).unwrap();
    let at = [[0, 0, 0], [2, 4, 5], [4, 3, 3], [3, 5, 7], [7, 9, 11], [1, 6, 2]];
    let golden = |v: [f32; 4]| -> Vec<_> {
        at.into_iter().zip([-1000.0, v[0], v[1], v[2], -1000.0, v[3]]).collect()
    };
    let linear = golden([113.775_15, 114.674_2, 107.423_47, 104.658_83]);
    check(&of(Interpolation::Linear), &linear, -222_780.425_8, 280);
    check(&of(Interpolation::Nearest), &golden([118.0, 184.0, 77.0, 134.0]), -223_023.0, 280);
    let cubic = golden([124.869_83, 126.673_6, 157.459_76, 95.960_61]);
    check(&of(Interpolation::Cubic), &cubic, -222_550.534_7, 280);
}

#[test]
fn values_at_another_spacing_are_simpleitks() {
    let pool = Pool::new(2);
    let from = oblique();
    let to = grid_of_spacing(&from, Spacing::new([1.25, 0.5, 1.15]).unwrap()).unwrap();
    assert_eq!(to.shape, [14, 16, 8]);
    let of = |how| resample(pattern().view(), &from.affine, &to, how, -1000.0, &pool).unwrap();
    let at = [[0, 0, 0], [5, 7, 4], [12, 15, 6], [13, 15, 6], [6, 3, 0]];
    let golden = |v: [f32; 5]| -> Vec<_> { at.into_iter().zip(v).collect() };
    check(&of(Interpolation::Linear), &golden([-40.0, 93.430_56, 12.625, -1000.0, 8.0]), 10_909.402_7, 128);
    check(&of(Interpolation::Nearest), &golden([-40.0, 19.0, -8.0, -1000.0, -15.0]), 11_038.0, 128);
    check(&of(Interpolation::Cubic), &golden([-40.0, 117.344_72, -2.697_978, -1000.0, -20.630_87]), 11_125.010_0, 128);
}

#[test]
fn the_same_grid_gives_the_same_values_and_labels_stay_labels() {
    let pool = Pool::new(1);
    let grid = oblique();
    assert_eq!(resample(pattern().view(), &grid.affine, &grid, Interpolation::Linear, 0.0, &pool).unwrap(), pattern());
    let cubic = resample(pattern().view(), &grid.affine, &grid, Interpolation::Cubic, 0.0, &pool).unwrap();
    assert!(cubic.iter().zip(&pattern()).all(|(a, b)| (a - b).abs() < 1e-3));
    let labels = pattern().mapv(|v| (v as i64).rem_euclid(3) as u8 * 100);
    let to = grid_of_spacing(&grid, Spacing::new([1.0, 0.4, 0.37]).unwrap()).unwrap();
    let fine = resample_nearest(labels.view(), &grid.affine, &to, 0, &pool).unwrap();
    assert!(fine.iter().all(|v| [0, 100, 200].contains(v)));
}

#[test]
fn nan_spreads_only_where_it_has_a_part() {
    let mut image = Array3::from_elem((1, 3, 4), 1.0f32);
    image[[0, 1, 1]] = f32::NAN;
    let grid = Grid { shape: [1, 3, 4], affine: Affine::axial(Spacing::new([1.0; 3]).unwrap(), [0.0; 3]) };
    let to = grid_of_spacing(&grid, Spacing::new([1.0, 0.5, 0.5]).unwrap()).unwrap();
    let found = resample(image.view(), &grid.affine, &to, Interpolation::Linear, 0.0, &Pool::new(1)).unwrap();
    assert!(found[[0, 2, 2]].is_nan() && found[[0, 2, 3]].is_nan() && found[[0, 1, 2]].is_nan());
    assert_eq!((found[[0, 0, 2]], found[[0, 2, 4]], found[[0, 2, 0]]), (1.0, 1.0, 1.0));
}

#[test]
fn an_orientation_moves_voxels_and_no_place() {
    let grid = oblique();
    let image = pattern();
    for code in ["LPS", "RAS", "PIR", "SLA", "ILA", "ras"] {
        let new = Reorientation::new(&grid, code).unwrap();
        assert_eq!(orientation(&new.grid.affine), code.to_uppercase());
        let moved = new.apply(image.view());
        assert_eq!(moved.shape(), new.grid.shape);
        for ((k, j, i), v) in moved.indexed_iter() {
            let lps = new.grid.affine.kji_to_lps([k as f64, j as f64, i as f64]);
            let old = grid.affine.to_voxel(lps).map(f64::round);
            assert_eq!(*v, image[[old[2] as usize, old[1] as usize, old[0] as usize]]);
            let back = grid.affine.to_lps(old);
            assert!((0..3).all(|r| (back[r] - lps[r]).abs() < 1e-9));
        }
    }
    assert_eq!(Reorientation::new(&grid, "LPS").unwrap().apply(image.view()), image);
    for bad in ["LRS", "LP", "LPSS", "XYZ", ""] {
        assert!(matches!(Reorientation::new(&grid, bad), Err(ResampleError::Orientation(_))));
    }
}

#[test]
fn absurd_grids_are_refused() {
    let tiny = Spacing::new([1e-6; 3]).unwrap();
    assert!(matches!(grid_of_spacing(&oblique(), tiny), Err(ResampleError::TooLarge(_))));
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let to = Grid { shape: [9, 9, 9], affine: Affine::axial(Spacing::new([1.3; 3]).unwrap(), [-11.0, 21.0, 6.0]) };
    let of = |n| {
        let pool = Pool::new(n);
        resample(pattern().view(), &oblique().affine, &to, Interpolation::Cubic, 0.0, &pool).unwrap()
    };
    assert_eq!(of(1), of(3));
}

#[test]
fn slabs_are_the_whole_bit_for_bit() {
    let pool = Pool::new(2);
    let from = oblique();
    let turned = Grid {
        shape: [9, 12, 13],
        affine: Affine::new([0.6, 0.1, 0.3], [-0.1, 0.8, 0.2], [-0.5, -0.2, 1.7], [-11.0, 21.0, 4.0]).unwrap(),
    };
    let beyond = Grid { affine: turned.affine.shifted([0.0, 0.0, -20.0]), ..turned };
    let finer = grid_of_spacing(&from, Spacing::new([0.7, 0.5, 1.15]).unwrap()).unwrap();
    let backwards = Reorientation::new(&from, "RAI").unwrap().grid;
    for to in [turned, beyond, finer, backwards] {
        let whole = resample(pattern().view(), &from.affine, &to, Interpolation::Linear, -1000.0, &pool).unwrap();
        let labels = resample_nearest(pattern().view(), &from.affine, &to, -1000.0, &pool).unwrap();
        let slabs = Slabs::new(&from, &to, -1000.0).unwrap();
        for step in [1, 2, 5] {
            for start in (0..to.shape[0]).step_by(step) {
                let new = start..(start + step).min(to.shape[0]);
                let old = slabs.needs(&new);
                // Only what is needed is there.
                let part = pattern().slice(ndarray::s![old.clone(), .., ..]).to_owned();
                let slab = slabs.slab(part.view(), old.start, new.clone(), &pool).unwrap();
                assert!(slab == whole.slice(ndarray::s![new.clone(), .., ..]), "{new:?} from {old:?}");
                let slab = nearest_slab(pattern().view(), &from.affine, &to, new.clone(), -1000.0, &pool).unwrap();
                assert!(slab == labels.slice(ndarray::s![new, .., ..]));
            }
        }
    }
}
