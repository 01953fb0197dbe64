//! Instruction sets: a kernel is one generic body, compiled once for each of them.
//!
//! A body does the same operations on each element whatever the width of the vectors, reduces in
//! integers only, and contracts nothing (Rust never does): so all variants give the same bytes, which
//! tests check on whatever the machine has. On aarch64 NEON is part of the baseline, so there the
//! portable variant is the NEON one.

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// What every machine of the target has.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The widest that this machine has. Cheap: the answer is kept by the standard library.
    pub(crate) fn detected() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Every variant that this machine can run, the portable one first.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        match Self::detected() {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => vec![Self::Portable, Self::Avx2, Self::Avx512],
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => vec![Self::Portable, Self::Avx2],
            Self::Portable => vec![Self::Portable],
        }
    }

    /// Runs `body`, compiled for this instruction set as far as it is inlined.
    #[inline]
    pub(crate) fn run<R>(self, body: impl FnOnce() -> R) -> R {
        match self {
            Self::Portable => body(),
            // SAFETY: this variant is handed out by `detected` and `available` alone, after they saw
            // that the machine has the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(body) },
            // SAFETY: as above; machines with AVX-512 have AVX2.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512(body) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<R>(body: impl FnOnce() -> R) -> R {
    body()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<R>(body: impl FnOnce() -> R) -> R {
    body()
}
