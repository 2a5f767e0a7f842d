//! The row kernel in plain Rust: the reference for all others.

use super::conv::{RowJob, requantize};

/// # Safety
/// The job's pointers are valid for all its steps, pixels and channels (see [`RowJob`]).
pub(super) unsafe fn row<const WIDTH: usize>(job: &RowJob) {
    for pixel in 0..job.pixels {
        // SAFETY: the caller's promise: `WIDTH` biases and scales, `steps` offsets and weights, and readable inputs.
        unsafe {
            let base = job.base.add(pixel * job.pixel);
            let mut sums = *job.bias.cast::<[i32; WIDTH]>();
            for step in 0..job.steps {
                let bytes = *base.add(*job.offsets.add(step) as usize).cast::<[u8; 4]>();
                let weights = &*job.weights.add(step * WIDTH * 4).cast::<[[i8; 4]; WIDTH]>();
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    for (byte, weight) in bytes.iter().zip(weights) {
                        *sum += i32::from(*byte) * i32::from(*weight);
                    }
                }
            }
            for (lane, sum) in sums.iter().take(job.lanes).enumerate() {
                let byte = requantize(*sum, *job.scale.add(lane), job.low, job.high, job.zero);
                job.out.add(pixel * job.out_pixel + lane).write(byte);
            }
        }
    }
}

/// Multiply-adds of one round of a loop that does nothing else.
pub(super) fn peak(rounds: usize) -> usize {
    let mut sums = [1i32; 16];
    let (mut x, mut w) = ([3i16; 32], [5i16; 32]);
    for _ in 0..rounds {
        x = std::hint::black_box(x);
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum += i32::from(x[2 * n]) * i32::from(w[2 * n]) + i32::from(x[2 * n + 1]) * i32::from(w[2 * n + 1]);
        }
        w = std::hint::black_box(w);
    }
    std::hint::black_box(sums);
    32
}
