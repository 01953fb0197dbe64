//! Which GPUs the kernels exist for, told before anything is made on one.
//!
//! Libraries refuse older cards too, each in its own words and some only when it is used.

use crate::{Error, Result};

/// The lowest compute capability that kernels are compiled for (`build.rs`): Ampere, which has bf16.
const LOWEST: (i32, i32) = (8, 0);

/// A GPU that the kernels can run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its name, as the driver gives it.
    pub name: String,
    /// Its compute capability, `(8, 9)` for sm_89.
    pub capability: (i32, i32),
}

impl Card {
    /// The GPU that the driver counts as `ordinal`.
    ///
    /// # Errors
    /// No driver, no such GPU; [`Error::OldCard`] for one older than the kernels.
    #[cfg(feature = "cuda")]
    pub fn of(ordinal: usize) -> Result<Self> {
        let (name, capability) = crate::kernels::cuda::card(ordinal)?;
        Self::supported(name, capability)
    }

    fn supported(name: String, capability: (i32, i32)) -> Result<Self> {
        if capability < LOWEST {
            return Err(Error::OldCard { name, capability });
        }
        Ok(Self { name, capability })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_cards_are_refused_by_name() {
        let error = Card::supported("GeForce GTX 1080".into(), (6, 1)).expect_err("too old");
        let text = "GeForce GTX 1080 (sm_61): mmgp needs compute capability 8.0 or newer";
        assert!(error.to_string().starts_with(text), "{error}");
        assert!(Card::supported("T4".into(), (7, 5)).is_err());
        for capability in [(8, 0), (8, 9), (9, 0), (12, 0)] {
            assert!(Card::supported("a card".into(), capability).is_ok(), "{capability:?}");
        }
    }
}
