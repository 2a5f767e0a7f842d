use std::collections::HashMap;
use std::convert::Infallible;
use std::f64::consts::PI;
use std::io::Cursor;

use super::*;
use crate::geometry::{Affine, Spacing};

fn grid(shape: [usize; 3], spacing: [f64; 3]) -> Grid {
    Grid { shape, affine: Affine::axial(Spacing::new(spacing).unwrap(), [-100.0, 50.0, 20.0]) }
}

/// The surface of a function of LPS.
fn surface_of(grid: Grid, level: Level, threads: usize, f: impl Fn([f64; 3]) -> f32 + Sync) -> (Surface, Measures) {
    let mut surface = Surface::default();
    let read = |k: usize, out: &mut [f32]| {
        for (n, v) in out.iter_mut().enumerate() {
            let (j, i) = (n / grid.shape[2], n % grid.shape[2]);
            *v = f(grid.affine.to_lps([i as f64, j as f64, k as f64]));
        }
    };
    let measures = extract::<Infallible>(grid, level, &Pool::new(threads), read, |patch| {
        surface.push(patch);
        Ok(())
    })
    .unwrap();
    (surface, measures)
}

fn sphere(centre: [f64; 3], radius: f64) -> impl Fn([f64; 3]) -> f32 + Sync {
    move |p| (radius - norm(sub(p, centre))) as f32
}

fn noise(seed: u64) -> impl Fn([f64; 3]) -> f32 + Sync {
    move |p| {
        let mut h = seed;
        for v in p {
            h = (h ^ v.to_bits()).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            h ^= h >> 29;
        }
        (h >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }
}

/// How often each directed side occurs, by position.
fn sides(surface: &Surface) -> HashMap<([u32; 3], [u32; 3]), usize> {
    let mut count = HashMap::new();
    let key = |v: u32| surface.vertices[v as usize].map(f32::to_bits);
    for t in &surface.triangles {
        for n in 0..3 {
            *count.entry((key(t[n]), key(t[(n + 1) % 3]))).or_insert(0) += 1;
        }
    }
    count
}

fn is_watertight(surface: &Surface) -> bool {
    let sides = sides(surface);
    !sides.is_empty() && sides.iter().all(|((a, b), n)| *n == 1 && sides.get(&(*b, *a)) == Some(&1))
}

fn euler_characteristic(surface: &Surface) -> i64 {
    surface.vertices.len() as i64 - sides(surface).len() as i64 / 2 + surface.triangles.len() as i64
}

const ZERO: Level = Level { value: 0.0, cap: false };
const CAPPED: Level = Level { value: 0.0, cap: true };

#[test]
fn a_sphere_has_the_area_and_volume_of_a_sphere() {
    for (spacing, mirrored) in [([1.0, 1.0, 1.0], false), ([2.0, 0.7, 0.9], false), ([2.0, 0.7, 0.9], true)] {
        let mut g = grid([40, 80, 80], spacing);
        if mirrored {
            g.affine = Affine::new([-0.9, 0.0, 0.0], [0.0, 0.7, 0.0], [0.0, 0.0, 2.0], [-28.0, 50.0, 20.0]).unwrap();
        }
        let centre = g.affine.to_lps([39.3, 40.2, 19.9]);
        let (surface, measures) = surface_of(g, ZERO, 1, sphere(centre, 15.0));
        let (area, volume) = (4.0 * PI * 225.0, 4.0 / 3.0 * PI * 3375.0);
        assert!((measures.area_mm2 / area - 1.0).abs() < 0.01, "{} instead of {area}", measures.area_mm2);
        assert!((measures.volume_mm3 / volume - 1.0).abs() < 0.01, "{} instead of {volume}", measures.volume_mm3);
        assert!((surface.volume_mm3() / measures.volume_mm3 - 1.0).abs() < 1e-5, "normals point outwards");
        assert!((surface.area_mm2() / measures.area_mm2 - 1.0).abs() < 1e-9);
        assert!(is_watertight(&surface));
        assert_eq!(euler_characteristic(&surface), 2);
        assert_eq!(measures.vertices, surface.vertices.len() as u64);
        let furthest = surface.vertices.iter().map(|v| (norm(sub(v.map(f64::from), centre)) - 15.0).abs());
        assert!(furthest.fold(0.0, f64::max) < 0.1, "vertices are in patient space, on the sphere");
    }
}

#[test]
fn noise_with_every_case_in_it_is_watertight_once_capped() {
    for seed in [1, 2, 3] {
        let (surface, measures) = surface_of(grid([37, 70, 21], [1.0; 3]), CAPPED, 2, noise(seed));
        assert!(is_watertight(&surface));
        assert!((surface.volume_mm3() / measures.volume_mm3 - 1.0).abs() < 1e-4);
    }
}

#[test]
fn voxels_exactly_at_the_level_do_not_tear_the_surface() {
    let steps = |seed| {
        let f = noise(seed);
        move |p| (f(p) * 3.0).round()
    };
    let (surface, _) = surface_of(grid([20, 30, 30], [1.0; 3]), CAPPED, 1, steps(5));
    assert!(is_watertight(&surface));
}

#[test]
fn the_volume_of_a_surface_cut_by_the_border_is_that_of_the_capped_one() {
    for f in [Box::new(sphere([-95.0, 60.0, 21.0], 12.0)) as Box<dyn Fn([f64; 3]) -> f32 + Sync>, Box::new(noise(9))] {
        let open = surface_of(grid([12, 24, 20], [1.5, 1.0, 1.0]), ZERO, 1, &f);
        let closed = surface_of(grid([12, 24, 20], [1.5, 1.0, 1.0]), CAPPED, 1, &f);
        assert!(!is_watertight(&open.0) && is_watertight(&closed.0));
        // Caps lie 1/1024 of a voxel outside.
        let difference = open.1.volume_mm3 / closed.1.volume_mm3 - 1.0;
        assert!(difference.abs() < 2e-3, "{difference}");
    }
}

#[test]
fn a_torus_has_one_hole_and_two_balls_are_two_surfaces() {
    let torus = |p: [f64; 3]| {
        let [x, y, z] = sub(p, [-80.0, 70.0, 40.0]);
        (3.0 - ((x.hypot(y) - 10.0).powi(2) + z * z).sqrt()) as f32
    };
    let (surface, _) = surface_of(grid([40, 40, 40], [1.0; 3]), ZERO, 1, torus);
    assert_eq!(euler_characteristic(&surface), 0);
    let balls = |p| sphere([-90.0, 60.0, 30.0], 5.3)(p).max(sphere([-70.0, 75.0, 50.0], 6.1)(p));
    let (surface, _) = surface_of(grid([40, 40, 40], [1.0; 3]), ZERO, 1, balls);
    assert_eq!(euler_characteristic(&surface), 4);
}

#[test]
fn the_surface_does_not_depend_on_the_number_of_threads() {
    let of = |threads| surface_of(grid([70, 33, 66], [1.0, 0.5, 0.5]), ZERO, threads, noise(4));
    let one = of(1);
    assert!(one == of(2) && one == of(8));
}

#[test]
fn nan_is_outside_and_counted_and_infinity_is_no_trouble() {
    let f = |p: [f64; 3]| match sphere([-90.0, 60.0, 30.0], 6.0)(p) {
        d if d > 3.0 => f32::INFINITY,
        d if d < -6.0 => f32::NEG_INFINITY,
        _ if p == [-90.0, 55.0, 30.0] => f32::NAN,
        d => d,
    };
    let (surface, measures) = surface_of(grid([20, 20, 20], [1.0; 3]), ZERO, 1, f);
    assert_eq!(measures.nan_voxels, 1);
    assert!(is_watertight(&surface));
    assert!(surface.vertices.iter().flatten().all(|v| v.is_finite()));
}

#[test]
fn what_is_no_volume_and_what_is_no_level_are_refused() {
    let go = |shape, value| {
        let level = Level { value, cap: false };
        extract::<Infallible>(grid(shape, [1.0; 3]), level, &Pool::new(1), |_, _| (), |_| Ok(())).unwrap_err()
    };
    assert!(matches!(go([1, 20, 20], 0.0), IsosurfaceError::NotAVolume([1, 20, 20])));
    assert!(matches!(go([5, 5, 5], f32::NAN), IsosurfaceError::Level(_)));
}

#[test]
fn smoothing_keeps_the_volume_and_takes_the_steps_away() {
    // A label map: only inside or outside, so the raw surface has steps.
    let label = |p| f32::from(sphere([-80.0, 70.0, 40.0], 12.0)(p) >= 0.0) - 0.5;
    let (mut surface, measures) = surface_of(grid([40, 40, 40], [1.0; 3]), ZERO, 1, label);
    let before = surface.area_mm2();
    smooth(&mut surface, 15);
    assert!(is_watertight(&surface));
    assert!((surface.volume_mm3() / measures.volume_mm3 - 1.0).abs() < 0.01);
    let area = 4.0 * PI * 144.0;
    assert!(before / area > 1.05 && (surface.area_mm2() / area - 1.0).abs() < 0.03, "{}", surface.area_mm2() / area);
}

#[test]
fn decimation_keeps_a_closed_surface_closed_and_near() {
    let (surface, measures) = surface_of(grid([40, 40, 40], [1.0; 3]), ZERO, 1, sphere([-80.0, 70.0, 40.0], 14.0));
    let small = decimate(&surface, surface.triangles.len() / 10, 1.0);
    assert!(small.triangles.len() <= surface.triangles.len() / 10);
    assert!(is_watertight(&small));
    assert_eq!(euler_characteristic(&small), 2);
    assert!((small.volume_mm3() / measures.volume_mm3 - 1.0).abs() < 0.01);
    let bounded = decimate(&surface, 0, 0.01);
    let off = bounded.vertices.iter().map(|v| (norm(sub(v.map(f64::from), [-80.0, 70.0, 40.0])) - 14.0).abs());
    assert!(off.fold(0.0, f64::max) < 0.15 && bounded.triangles.len() < surface.triangles.len());
}

#[test]
fn files_hold_the_surface() {
    let (surface, _) = surface_of(grid([12, 12, 12], [1.0; 3]), ZERO, 1, sphere([-94.0, 56.0, 26.0], 4.0));
    let mut stl = StlWriter::new(Cursor::new(Vec::new())).unwrap();
    stl.write(&surface.vertices, &surface.triangles).unwrap();
    let stl = stl.finish().unwrap().into_inner();
    assert_eq!(stl.len(), 84 + 50 * surface.triangles.len());
    assert_eq!(stl[80..84], (surface.triangles.len() as u32).to_le_bytes());
    assert!(!stl.starts_with(b"solid"), "readers would take it for text");
    assert_eq!(stl[84 + 12..84 + 16], surface.vertices[surface.triangles[0][0] as usize][0].to_le_bytes());

    let mut ply = Vec::new();
    write_ply(&surface, &mut ply).unwrap();
    let header = ply.windows(11).position(|w| w == b"end_header\n").unwrap() + 11;
    assert_eq!(ply.len() - header, surface.vertices.len() * 12 + surface.triangles.len() * 13);

    let mut obj = Vec::new();
    write_obj(&surface, &mut obj).unwrap();
    let obj = String::from_utf8(obj).unwrap();
    assert_eq!(obj.lines().filter(|l| l.starts_with("f ")).count(), surface.triangles.len());

    let mut glb = Vec::new();
    write_glb(&surface, &mut glb).unwrap();
    assert_eq!(glb[8..12], (glb.len() as u32).to_le_bytes());
    let json_len = u32::from_le_bytes(glb[12..16].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&glb[20..20 + json_len]).unwrap();
    assert_eq!(json["accessors"][0]["count"], surface.vertices.len());
    assert_eq!(glb.len(), 20 + json_len + 8 + json["buffers"][0]["byteLength"].as_u64().unwrap() as usize);
    assert!(write_glb(&Surface::default(), Vec::new()).is_err());
}
