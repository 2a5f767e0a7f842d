//! Networks in integers: an 8-bit graph, its plan in one arena, and the kernels that run it.
//!
//! Activations lie as `[depth, row, column, channel]` bytes, one volume at a time. Inside, every activation is unsigned:
//! a signed one is stored with 128 added to it and to its zero point, which changes no result. Accumulators are `i32`,
//! and one rule turns them into bytes again (that of ONNX Runtime's `QLinearConv`): convert to `f32`, multiply by the
//! combined scale, clamp, round half to even, add the zero point. Each of these is exact or correctly rounded by
//! IEEE 754, so all kernels on all processors give the same bits.

pub mod graph;

mod conv;
mod float;
mod memory;
mod pack;
mod plan;
mod portable;
mod simple;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use float::FloatConv;
pub use memory::Memory;
pub use plan::{Program, ProgramStep};

/// The environment variable that overrules [`Kernel::best`], for tests and measurements.
pub const KERNEL_VARIABLE: &str = "SCANSIDE_KERNEL";

/// A family of instructions for the inner loops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Plain Rust: the reference, and what runs where nothing better is known.
    Portable,
    /// x86-64 with AVX2: `vpmaddubsw` under a proof that no 16-bit sum saturates.
    Avx2,
    /// x86-64 with AVX-VNNI: `vpdpbusd` on 32 bytes.
    AvxVnni,
    /// x86-64 with AVX-512 VNNI: `vpdpbusd` on 64 bytes.
    Vnni,
    /// aarch64: SMULL and SMLAL into 16 bits, under a proof that no sum overflows.
    Neon,
    /// aarch64 with dot products (ARMv8.2).
    Sdot,
    /// aarch64 with matrix products of bytes (ARMv8.6): USMMLA.
    I8mm,
}

impl Kernel {
    /// Its name, as [`KERNEL_VARIABLE`] takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Vnni => "vnni",
            Self::Neon => "neon",
            Self::Sdot => "sdot",
            Self::I8mm => "i8mm",
        }
    }

    /// Those that this processor can run, the portable one first and the fastest last.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(unused_mut))]
        let mut kernels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                kernels.push(Self::Avx2);
            }
            // Its twin in the other encoding stands in for it in the tests.
            if x86_64::has_avxvnni() || (cfg!(test) && x86_64::has_vnni()) {
                kernels.push(Self::AvxVnni);
            }
            if x86_64::has_vnni() {
                kernels.push(Self::Vnni);
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            kernels.push(Self::Neon);
            if aarch64::has_sdot() {
                kernels.push(Self::Sdot);
            }
            if aarch64::has_i8mm() {
                kernels.push(Self::I8mm);
            }
        }
        kernels
    }

    /// The fastest one of this processor, or the one that [`KERNEL_VARIABLE`] names if the processor has it.
    pub fn best() -> Self {
        let kernels = Self::available();
        let asked = std::env::var(KERNEL_VARIABLE).ok();
        if let Some(name) = asked.as_deref().filter(|name| !name.is_empty()) {
            match kernels.iter().find(|kernel| kernel.name() == name) {
                Some(kernel) => return *kernel,
                None => log::warn!("{KERNEL_VARIABLE}={name}: this processor has only {kernels:?}"),
            }
        }
        *kernels.last().expect("the portable one is always there")
    }

    fn row(self, width: usize) -> conv::RowKernel {
        match (self, width) {
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, 16) => x86_64::row_avx2_16,
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, _) => x86_64::row_avx2_8,
            #[cfg(all(test, target_arch = "x86_64"))]
            (Self::AvxVnni, _) if !x86_64::has_avxvnni() => {
                if width == 16 { x86_64::row_avxvnni_16_twin } else { x86_64::row_avxvnni_8_twin }
            }
            #[cfg(target_arch = "x86_64")]
            (Self::AvxVnni, 16) => x86_64::row_avxvnni_16,
            #[cfg(target_arch = "x86_64")]
            (Self::AvxVnni, _) => x86_64::row_avxvnni_8,
            #[cfg(target_arch = "x86_64")]
            (Self::Vnni, 16) => x86_64::row_vnni_16,
            #[cfg(target_arch = "x86_64")]
            (Self::Vnni, _) => x86_64::row_vnni_8,
            #[cfg(target_arch = "aarch64")]
            (Self::Neon, 16) => aarch64::row_neon_16,
            #[cfg(target_arch = "aarch64")]
            (Self::Neon, _) => aarch64::row_neon_8,
            #[cfg(target_arch = "aarch64")]
            (Self::Sdot, 16) => aarch64::row_sdot_16,
            #[cfg(target_arch = "aarch64")]
            (Self::Sdot, _) => aarch64::row_sdot_8,
            #[cfg(target_arch = "aarch64")]
            (Self::I8mm, 16) => aarch64::row_i8mm_16,
            #[cfg(target_arch = "aarch64")]
            (Self::I8mm, _) => aarch64::row_i8mm_8,
            (_, 16) => portable::row::<16>,
            _ => portable::row::<8>,
        }
    }
}

/// Multiply-adds of bytes that one core does with `kernel` in registers alone, in 10^9 per second of its CPU time: what the
/// inner loops are measured against.
pub fn integer_peak(kernel: Kernel) -> f64 {
    let cpu = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    };
    const ROUNDS: usize = 1 << 20;
    let best = (0..5).map(|_| {
        let start = cpu();
        let each = match kernel {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has what the kernel needs, or it would not have been chosen.
            Kernel::Vnni => unsafe { x86_64::peak_vnni(ROUNDS) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kernel::AvxVnni => unsafe { x86_64::peak_avxvnni(ROUNDS) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kernel::Avx2 => unsafe { x86_64::peak_avx2(ROUNDS) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Kernel::Sdot | Kernel::I8mm => unsafe { aarch64::peak_sdot(ROUNDS) },
            _ => portable::peak(ROUNDS),
        };
        each as f64 * ROUNDS as f64 / (cpu() - start).max(1e-9) / 1e9
    });
    best.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests;
