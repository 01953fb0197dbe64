//! Amounts of memory, printed as people read them.

use std::fmt;

/// A number of bytes. Prints in units of 10^3, 10^6 and 10^9.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            n if n >= 1_000_000_000 => format!("{:.2} GB", n as f64 / 1e9),
            n if n >= 1_000_000 => format!("{:.2} MB", n as f64 / 1e6),
            n if n >= 1_000 => format!("{:.1} kB", n as f64 / 1e3),
            n => format!("{n} B"),
        };
        f.pad(&text)
    }
}

impl Bytes {
    /// Reads `6MB`, `1.5 GB`, `512MiB`, `100000` (bytes); `None` if it is none of these.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.,
            "k" | "kb" => 1e3,
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "kib" => 1024.,
            "mib" => 1024f64.powi(2),
            "gib" => 1024f64.powi(3),
            _ => return None,
        };
        let bytes = number.parse::<f64>().ok()? * unit;
        (bytes.is_finite() && bytes < 1e18).then_some(Bytes(bytes as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::Bytes;

    #[test]
    fn units_are_decimal_unless_they_say_otherwise() {
        for (text, bytes) in [
            ("6MB", 6_000_000),
            ("1.5 GB", 1_500_000_000),
            ("512MiB", 512 << 20),
            ("12", 12),
            ("3k", 3000),
        ] {
            assert_eq!(Bytes::parse(text), Some(Bytes(bytes)), "{text}");
        }
        for text in ["", "MB", "6 apples", "1.2.3MB", "-5MB", "1e30GB", "nan"] {
            assert_eq!(Bytes::parse(text), None, "{text}");
        }
    }
}
