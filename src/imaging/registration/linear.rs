//! Three by three.

/// Rows of a 3 x 3 matrix.
pub(super) type Matrix = [[f64; 3]; 3];

pub(super) fn identity() -> Matrix {
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
}

pub(super) fn multiply(a: Matrix, b: Matrix) -> Matrix {
    std::array::from_fn(|r| std::array::from_fn(|c| (0..3).map(|n| a[r][n] * b[n][c]).sum()))
}

pub(super) fn transposed(a: Matrix) -> Matrix {
    std::array::from_fn(|r| std::array::from_fn(|c| a[c][r]))
}

pub(super) fn times(a: &Matrix, v: [f64; 3]) -> [f64; 3] {
    a.map(|row| crate::geometry::dot(row, v))
}
