//! The element types a safetensors file can hold, by the names the format gives them.
//!
//! A dtype here is a name and a width, nothing more: what the bits mean is the business of the crates above. Widths are in bits because
//! the microscaling types (4 and 6 bits) are packed.

use std::fmt;
use std::str::FromStr;

/// The type of a tensor's elements, little endian in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Dtype {
    /// One byte, 0 or 1 (`BOOL`).
    Bool,
    /// Unsigned 8 bit integer.
    U8,
    /// Signed 8 bit integer.
    I8,
    /// Unsigned 16 bit integer.
    U16,
    /// Signed 16 bit integer.
    I16,
    /// Unsigned 32 bit integer.
    U32,
    /// Signed 32 bit integer.
    I32,
    /// Unsigned 64 bit integer.
    U64,
    /// Signed 64 bit integer.
    I64,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: the upper half of an `F32`.
    BF16,
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 double precision.
    F64,
    /// 8 bit float, 4 bits exponent, 3 bits mantissa, no infinities (`F8_E4M3`, <https://arxiv.org/abs/2209.05433>).
    F8E4M3,
    /// 8 bit float, 5 bits exponent, 2 bits mantissa (`F8_E5M2`, <https://arxiv.org/abs/2209.05433>).
    F8E5M2,
    /// 8 bit exponent alone, the scale of the OCP microscaling formats (`F8_E8M0`).
    F8E8M0,
    /// 4 bit float of the OCP microscaling formats, two to a byte (`F4`).
    F4,
    /// 6 bit float, 2 bits exponent, 3 bits mantissa, packed (`F6_E2M3`).
    F6E2M3,
    /// 6 bit float, 3 bits exponent, 2 bits mantissa, packed (`F6_E3M2`).
    F6E3M2,
    /// Complex number of two `F32`.
    C64,
}

impl Dtype {
    /// Every dtype of this crate, in declaration order.
    pub const ALL: [Self; 20] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::U64,
        Self::I64,
        Self::F16,
        Self::BF16,
        Self::F32,
        Self::F64,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::F8E8M0,
        Self::F4,
        Self::F6E2M3,
        Self::F6E3M2,
        Self::C64,
    ];

    /// The width of one element in bits.
    pub const fn bits(self) -> u64 {
        match self {
            Self::F4 => 4,
            Self::F6E2M3 | Self::F6E3M2 => 6,
            Self::Bool | Self::U8 | Self::I8 | Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 => 8,
            Self::U16 | Self::I16 | Self::F16 | Self::BF16 => 16,
            Self::U32 | Self::I32 | Self::F32 => 32,
            Self::U64 | Self::I64 | Self::F64 | Self::C64 => 64,
        }
    }

    /// The bytes that `elements` packed elements take; `None` if that overflows or is no whole number of bytes.
    pub const fn bytes_for(self, elements: u64) -> Option<u64> {
        match elements.checked_mul(self.bits()) {
            Some(bits) if bits % 8 == 0 => Some(bits / 8),
            _ => None,
        }
    }

    /// The name the safetensors format uses: `BF16`, `F8_E4M3`, `BOOL`, …
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::U16 => "U16",
            Self::I16 => "I16",
            Self::U32 => "U32",
            Self::I32 => "I32",
            Self::U64 => "U64",
            Self::I64 => "I64",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E8M0 => "F8_E8M0",
            Self::F4 => "F4",
            Self::F6E2M3 => "F6_E2M3",
            Self::F6E3M2 => "F6_E3M2",
            Self::C64 => "C64",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(name: &str) -> Result<Self, UnknownDtype> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| UnknownDtype(name.into()))
    }
}

/// A dtype name that the format does not have, or that this crate does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype `{0}`")]
pub struct UnknownDtype(pub String);

/// The number of elements of a shape (1 for a scalar); `None` if it overflows.
///
/// Multiplied from the left as the reference reader does, so that `[2^40, 2^40, 0]` overflows for both.
pub(crate) fn elements(shape: &[usize]) -> Option<u64> {
    shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(u64::try_from(dim).ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_name_reads_back() {
        for dtype in Dtype::ALL {
            assert_eq!(dtype.to_string().parse::<Dtype>().unwrap(), dtype);
        }
        assert_eq!("F12".parse::<Dtype>().unwrap_err().to_string(), "unknown dtype `F12`");
        assert!("bf16".parse::<Dtype>().is_err());
    }

    #[test]
    fn packed_types_need_whole_bytes() {
        assert_eq!(Dtype::F4.bytes_for(6), Some(3));
        assert_eq!(Dtype::F4.bytes_for(5), None);
        assert_eq!(Dtype::F6E2M3.bytes_for(4), Some(3));
        assert_eq!(Dtype::F6E3M2.bytes_for(2), None);
        assert_eq!(Dtype::BF16.bytes_for(0), Some(0));
        assert_eq!(Dtype::F64.bytes_for(u64::MAX / 8), None);
    }

    #[test]
    fn elements_of_scalars_and_overflow() {
        assert_eq!(elements(&[]), Some(1));
        assert_eq!(elements(&[3, 0, 5]), Some(0));
        assert_eq!(elements(&[usize::MAX, 2]), None);
    }
}
