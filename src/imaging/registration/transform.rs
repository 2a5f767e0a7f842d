//! Transforms from fixed to moving patient space, as ITK defines them, and their files.
//!
//! Each takes a place `x` of the fixed image to `M (x - c) + c + t` in the moving image, LPS millimetres; `c` is a
//! centre that is chosen once, so that turning does not shift.

use std::fmt::Write as _;

use super::linear::{Matrix, identity, multiply, times};
use crate::geometry::{Affine, BadGeometry, dot, norm};

/// How a moving image may differ from the fixed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Shifted: 3 parameters, ITK's `TranslationTransform`.
    Translation,
    /// Turned and shifted: angles about x, y and z in radians (the turn about y first, then x, then z), then the shift;
    /// 6 parameters, ITK's `Euler3DTransform`.
    Rigid,
    /// Turned, shifted and scaled: vector part of the unit quaternion, shift, scale; 7 parameters, ITK's
    /// `Similarity3DTransform`.
    Similarity,
    /// Any linear map: the matrix row by row, then the shift; 12 parameters, ITK's `AffineTransform`.
    Affine,
}

impl Kind {
    /// Number of parameters.
    pub fn parameters(self) -> usize {
        match self {
            Self::Translation => 3,
            Self::Rigid => 6,
            Self::Similarity => 7,
            Self::Affine => 12,
        }
    }

    /// The name ITK writes into files.
    pub fn itk_name(self) -> &'static str {
        match self {
            Self::Translation => "TranslationTransform_double_3_3",
            Self::Rigid => "Euler3DTransform_double_3_3",
            Self::Similarity => "Similarity3DTransform_double_3_3",
            Self::Affine => "AffineTransform_double_3_3",
        }
    }
}

/// A file that holds no transform we know.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BadTransform {
    /// The first line is not ITK's.
    #[error("not an ITK transform file: it does not begin with \"#Insight Transform File V1.0\"")]
    Header,
    /// A kind that is not one of [`Kind`], nor `VersorRigid3DTransform`.
    #[error("transforms of the kind {0} are not supported")]
    Kind(String),
    /// More or fewer than one transform.
    #[error("the file holds {0} transforms where one is wanted")]
    Count(usize),
    /// A parameter line that is missing, has the wrong length or no numbers.
    #[error("line {0}: {1} finite numbers are wanted")]
    Numbers(&'static str, usize),
    /// A quaternion longer than 1, or a scale that is not above 0.
    #[error("the parameters describe no rotation or scale")]
    Values,
}

/// Takes places of the fixed image to places of the moving image.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    kind: Kind,
    centre_lps_mm: [f64; 3],
    parameters: Vec<f64>,
}

impl Transform {
    /// The transform that leaves everything where it is.
    pub fn identity(kind: Kind, centre_lps_mm: [f64; 3]) -> Self {
        let mut parameters = vec![0.0; kind.parameters()];
        match kind {
            Kind::Translation | Kind::Rigid => {}
            Kind::Similarity => parameters[6] = 1.0,
            Kind::Affine => [0, 4, 8].iter().for_each(|n| parameters[*n] = 1.0),
        }
        Self { kind, centre_lps_mm, parameters }
    }

    /// A rigid transform of angles (radians about x, y and z, as in [`Kind::Rigid`]) and a shift.
    pub fn rigid(centre_lps_mm: [f64; 3], angles: [f64; 3], shift_mm: [f64; 3]) -> Self {
        Self { kind: Kind::Rigid, centre_lps_mm, parameters: [angles, shift_mm].concat() }
    }

    /// What it may do.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The fixed point of turning and scaling.
    pub fn centre_lps_mm(&self) -> [f64; 3] {
        self.centre_lps_mm
    }

    /// The parameters in ITK's order.
    pub fn parameters(&self) -> &[f64] {
        &self.parameters
    }

    /// The same kind and centre with other parameters; a quaternion that has grown too long is cut back.
    pub(super) fn with_parameters(&self, mut parameters: Vec<f64>) -> Self {
        if self.kind == Kind::Similarity {
            let length = norm([parameters[0], parameters[1], parameters[2]]);
            if length > 0.999 {
                parameters[..3].iter_mut().for_each(|v| *v *= 0.999 / length);
            }
            parameters[6] = parameters[6].max(1e-3);
        }
        Self { parameters, ..self.clone() }
    }

    /// Where the shift begins among the parameters.
    fn shift_at(&self) -> usize {
        match self.kind {
            Kind::Translation => 0,
            Kind::Rigid | Kind::Similarity => 3,
            Kind::Affine => 9,
        }
    }

    /// The shift `t` in millimetres.
    pub fn shift_mm(&self) -> [f64; 3] {
        let at = self.shift_at();
        [self.parameters[at], self.parameters[at + 1], self.parameters[at + 2]]
    }

    pub(super) fn set_shift(&mut self, shift_mm: [f64; 3]) {
        let at = self.shift_at();
        self.parameters[at..at + 3].copy_from_slice(&shift_mm);
    }

    /// The matrix `M`.
    pub fn matrix(&self) -> Matrix {
        let p = &self.parameters;
        match self.kind {
            Kind::Translation => identity(),
            Kind::Rigid => {
                let [x, y, z] = [p[0], p[1], p[2]];
                multiply(multiply(about_z(z), about_x(x)), about_y(y))
            }
            Kind::Similarity => versor([p[0], p[1], p[2]]).map(|row| row.map(|v| v * p[6])),
            Kind::Affine => [[p[0], p[1], p[2]], [p[3], p[4], p[5]], [p[6], p[7], p[8]]],
        }
    }

    /// `M` and the offset `o` of the same map written as `M x + o`, as 16 numbers, row by row.
    pub fn to_row_major(&self) -> [f64; 16] {
        let m = self.matrix();
        let offset = self.apply([0.0; 3]);
        let mut out = [0.0; 16];
        for r in 0..3 {
            out[4 * r..4 * r + 3].copy_from_slice(&m[r]);
            out[4 * r + 3] = offset[r];
        }
        out[15] = 1.0;
        out
    }

    /// The place in the moving image.
    pub fn apply(&self, lps_mm: [f64; 3]) -> [f64; 3] {
        let c = self.centre_lps_mm;
        let turned = times(&self.matrix(), crate::geometry::sub(lps_mm, c));
        let t = self.shift_mm();
        std::array::from_fn(|r| turned[r] + c[r] + t[r])
    }

    /// A grid's affine with the transform after it: resampled there, a moving image lies on the fixed grid.
    ///
    /// # Errors
    /// [`BadGeometry::Affine`] when the transform flattens space.
    pub fn carry(&self, fixed: &Affine) -> Result<Affine, BadGeometry> {
        let matrix = self.matrix();
        let [i, j, k] = [0, 1, 2].map(|axis| times(&matrix, fixed.step(axis)));
        Affine::new(i, j, k, self.apply(fixed.origin()))
    }

    /// How `M` changes with each parameter; the shift changes with its own.
    pub(super) fn matrix_derivatives(&self) -> Vec<Matrix> {
        let p = &self.parameters;
        let zero = [[0.0; 3]; 3];
        let mut all = vec![zero; self.kind.parameters()];
        match self.kind {
            Kind::Translation => {}
            Kind::Rigid => {
                let [x, y, z] = [p[0], p[1], p[2]];
                // d/da of a turn is the turn by a further quarter, without its axis.
                let quarter = std::f64::consts::FRAC_PI_2;
                let without = |mut m: Matrix, axis: usize| {
                    m[axis][axis] = 0.0;
                    m
                };
                let (rx, ry, rz) = (about_x(x), about_y(y), about_z(z));
                all[0] = multiply(multiply(rz, without(about_x(x + quarter), 0)), ry);
                all[1] = multiply(multiply(rz, rx), without(about_y(y + quarter), 1));
                all[2] = multiply(multiply(without(about_z(z + quarter), 2), rx), ry);
            }
            Kind::Similarity => {
                let v = [p[0], p[1], p[2]];
                for (n, derivative) in versor_derivatives(v).into_iter().enumerate() {
                    all[n] = derivative.map(|row| row.map(|d| d * p[6]));
                }
                all[6] = versor(v);
            }
            Kind::Affine => (0..9).for_each(|n| all[n][n / 3][n % 3] = 1.0),
        }
        all
    }

    /// Gradient over the parameters, from the gradient over `M` and over the shift.
    pub(super) fn chain(&self, over_matrix: &Matrix, over_shift: [f64; 3]) -> Vec<f64> {
        let mut gradient: Vec<f64> = self
            .matrix_derivatives()
            .iter()
            .map(|d| (0..3).map(|r| dot(d[r], over_matrix[r])).sum())
            .collect();
        let at = self.shift_at();
        gradient[at..at + 3].copy_from_slice(&over_shift);
        gradient
    }

    /// The text of an ITK transform file (`.tfm`), which ITK and SimpleITK read.
    pub fn to_tfm(&self) -> String {
        let mut text = String::from("#Insight Transform File V1.0\n#Transform 0\n");
        let numbers = |values: &[f64]| values.iter().map(f64::to_string).collect::<Vec<_>>().join(" ");
        let fixed = match self.kind {
            Kind::Translation => String::new(),
            // The fourth says in which order the turns are made: 0 is z x y.
            Kind::Rigid => format!("{} 0", numbers(&self.centre_lps_mm)),
            Kind::Similarity | Kind::Affine => numbers(&self.centre_lps_mm),
        };
        let _ = writeln!(text, "Transform: {}", self.kind.itk_name());
        let _ = writeln!(text, "Parameters: {}", numbers(&self.parameters));
        let _ = writeln!(text, "FixedParameters: {fixed}");
        text
    }

    /// Reads the text of an ITK transform file that holds one transform of a known kind. `VersorRigid3DTransform` and
    /// `Euler3DTransform` in the order z y x become [`Kind::Rigid`] with the same matrix.
    ///
    /// # Errors
    /// [`BadTransform`]
    pub fn from_tfm(text: &str) -> Result<Self, BadTransform> {
        if !text.trim_start().starts_with("#Insight Transform File V1.0") {
            return Err(BadTransform::Header);
        }
        let values = |key: &str| {
            text.lines().filter_map(|line| line.trim().strip_prefix(key)).map(str::trim).collect::<Vec<_>>()
        };
        let names = values("Transform:");
        let [name] = names[..] else { return Err(BadTransform::Count(names.len())) };
        let numbers = |key: &'static str| -> Option<Vec<f64>> {
            let lines = values(key);
            let parsed: Result<Vec<f64>, _> = lines.first()?.split_whitespace().map(str::parse).collect();
            parsed.ok().filter(|n| n.iter().all(|v| v.is_finite()))
        };
        let of = |key: &'static str, lengths: &[usize]| {
            numbers(key)
                .filter(|n| lengths.contains(&n.len()))
                .ok_or(BadTransform::Numbers(key, *lengths.last().unwrap_or(&0)))
        };
        let base = name.split('_').next().unwrap_or_default();
        if !name.ends_with("_3_3") {
            return Err(BadTransform::Kind(name.chars().take(80).collect()));
        }
        let kind = match base {
            "TranslationTransform" => Kind::Translation,
            "Euler3DTransform" | "VersorRigid3DTransform" => Kind::Rigid,
            "Similarity3DTransform" => Kind::Similarity,
            "AffineTransform" | "MatrixOffsetTransformBase" => Kind::Affine,
            _ => return Err(BadTransform::Kind(name.chars().take(80).collect())),
        };
        let parameters = of("Parameters:", &[kind.parameters()])?;
        let fixed = if kind == Kind::Translation { vec![0.0; 3] } else { of("FixedParameters:", &[4, 3])? };
        let centre_lps_mm = [fixed[0], fixed[1], fixed[2]];
        let v = [parameters[0], parameters[1], parameters[2]];
        let is_versor = base == "VersorRigid3DTransform" || kind == Kind::Similarity;
        if is_versor && norm(v) > 1.0 || kind == Kind::Similarity && parameters[6] <= 0.0 {
            return Err(BadTransform::Values);
        }
        let read = Self { kind, centre_lps_mm, parameters };
        Ok(if base == "VersorRigid3DTransform" {
            Self::rigid(centre_lps_mm, angles_of(&versor(v)), read.shift_mm())
        } else if kind == Kind::Rigid && fixed.get(3).is_some_and(|order| *order != 0.0) {
            let matrix = multiply(multiply(about_z(v[2]), about_y(v[1])), about_x(v[0]));
            Self::rigid(centre_lps_mm, angles_of(&matrix), read.shift_mm())
        } else {
            read
        })
    }
}

fn about_x(a: f64) -> Matrix {
    let (s, c) = a.sin_cos();
    [[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]]
}

fn about_y(a: f64) -> Matrix {
    let (s, c) = a.sin_cos();
    [[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]]
}

fn about_z(a: f64) -> Matrix {
    let (s, c) = a.sin_cos();
    [[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]
}

/// Angles about x, y, z whose turns, y first, then x, then z, make this rotation.
fn angles_of(m: &Matrix) -> [f64; 3] {
    let x = m[2][1].clamp(-1.0, 1.0).asin();
    if x.cos().abs() > 1e-9 {
        [x, (-m[2][0]).atan2(m[2][2]), (-m[0][1]).atan2(m[1][1])]
    } else {
        [x, 0.0, m[1][0].atan2(m[0][0])]
    }
}

/// The rotation of the unit quaternion with this vector part.
fn versor([x, y, z]: [f64; 3]) -> Matrix {
    let w = (1.0 - x * x - y * y - z * z).max(0.0).sqrt();
    [
        [1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - z * w), 2.0 * (x * z + y * w)],
        [2.0 * (x * y + z * w), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - x * w)],
        [2.0 * (x * z - y * w), 2.0 * (y * z + x * w), 1.0 - 2.0 * (x * x + y * y)],
    ]
}

fn versor_derivatives(v: [f64; 3]) -> [Matrix; 3] {
    let [x, y, z] = v;
    let w = (1.0 - x * x - y * y - z * z).max(1e-6).sqrt();
    std::array::from_fn(|n| {
        // dw/dv_n = -v_n / w
        let dw = -v[n] / w;
        let d = |a: usize, b: usize| {
            // derivative of v_a v_b
            f64::from(a == n) * v[b] + f64::from(b == n) * v[a]
        };
        let dvw = |a: usize| f64::from(a == n) * w + v[a] * dw;
        [
            [-2.0 * (d(1, 1) + d(2, 2)), 2.0 * (d(0, 1) - dvw(2)), 2.0 * (d(0, 2) + dvw(1))],
            [2.0 * (d(0, 1) + dvw(2)), -2.0 * (d(0, 0) + d(2, 2)), 2.0 * (d(1, 2) - dvw(0))],
            [2.0 * (d(0, 2) - dvw(1)), 2.0 * (d(1, 2) + dvw(0)), -2.0 * (d(0, 0) + d(1, 1))],
        ]
    })
}
