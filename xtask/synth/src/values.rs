//! What stands in a tensor: random numbers whose size is a function of the tensor's name and shape.
//!
//! Layers keep the size of what flows through them, as trained ones about do, and the final
//! projections see to it that a denoising run ends near where it began. Numbers come from a counter,
//! so any part of a tensor can be made by any thread, and the same seed gives the same bytes.

use half::{bf16, f16};
use rayon::prelude::*;

/// Bytes that are made at once: all the memory that a tensor of any size needs.
const PIECE: usize = 16 << 20;
/// Values that one task makes.
const TASK: usize = 64 << 10;

/// The normal distribution that a tensor is drawn from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normal {
    /// Its mean.
    pub mean: f64,
    /// Its standard deviation.
    pub deviation: f64,
}

impl Normal {
    /// The distribution of the tensor `name`.
    pub fn of(name: &str, shape: &[usize]) -> Self {
        let zero = |deviation| Self { mean: 0., deviation };
        let fan_in = shape.iter().skip(1).product::<usize>().max(1) as f64;
        let kept = 1. / fan_in.sqrt();
        match name {
            _ if name.ends_with("bias") => zero(0.02),
            // Added to scores that are about 1.
            _ if name.ends_with("relative_attention_bias.weight") => zero(0.1),
            _ if shape.len() == 1 => Self { mean: 1., deviation: 0.05 },
            _ if is_table(name) => zero(1.),
            // T5 does not divide its scores by √64: its queries are that much smaller.
            _ if name.ends_with("SelfAttention.q.weight") => zero(kept / 8.),
            // What leaves a model: a velocity, a picture in about -1..1.
            "proj_out.weight" => zero(0.7 * kept),
            _ if ["conv_out.weight", "conv_out.conv.weight"]
                .iter()
                .any(|end| name.ends_with(end)) =>
            {
                zero(0.5 * kept)
            }
            _ => zero(kept),
        }
    }
}

/// Whether rows of the tensor are looked up, not multiplied.
fn is_table(name: &str) -> bool {
    ["shared.weight", "embed_tokens.weight", "token_embedding.weight", "position_embedding.weight"]
        .iter()
        .any(|table| name.ends_with(table))
}

/// The form of the values, 16 bits each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// bf16
    Bf16,
    /// f16
    F16,
}

/// Makes the values of the tensor `name` and hands its bytes to `write`, piece by piece.
///
/// # Errors
/// Those of `write`.
pub fn make<E>(
    name: &str,
    shape: &[usize],
    float: Float,
    seed: u64,
    mut write: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let table = table(Normal::of(name, shape), float);
    let stream = stream(name, seed);
    let elements: usize = shape.iter().product();
    let mut piece = vec![0u8; PIECE.min(2 * elements)];
    let mut first = 0;
    while first < elements {
        let count = (PIECE / 2).min(elements - first);
        piece[..2 * count].par_chunks_mut(2 * TASK).enumerate().for_each(|(task, bytes)| {
            let start = (first + task * TASK) as u64;
            for (i, pair) in bytes.chunks_mut(4).enumerate() {
                let [a, b] = sums_of_bytes(mix(stream.wrapping_add(start / 2 + i as u64)));
                let values = u32::from(table[a]) | u32::from(table[b]) << 16;
                match pair.first_chunk_mut::<4>() {
                    Some(pair) => *pair = values.to_le_bytes(),
                    None => pair.copy_from_slice(&values.to_le_bytes()[..pair.len()]),
                }
            }
        });
        write(&piece[..2 * count])?;
        first += count;
    }
    Ok(())
}

/// The largest sum of four bytes.
const SUM: usize = 4 * 255;

/// The sum of four random bytes is nearly normal: the bits of the value that each stands for.
fn table(normal: Normal, float: Float) -> [u16; SUM + 1] {
    // Of four numbers that are evenly spread over 0..=255.
    let (middle, deviation) = (SUM as f64 / 2., (4. * (256f64 * 256. - 1.) / 12.).sqrt());
    std::array::from_fn(|sum| {
        let value = (sum as f64 - middle) / deviation * normal.deviation + normal.mean;
        match float {
            Float::Bf16 => bf16::from_f64(value).to_bits(),
            Float::F16 => f16::from_f64(value).to_bits(),
        }
    })
}

/// The sums of the four low and the four high bytes, each at most [`SUM`].
fn sums_of_bytes(bits: u64) -> [usize; 2] {
    const LANES: u64 = 0x00ff_00ff_00ff_00ff;
    let pairs = (bits & LANES) + ((bits >> 8) & LANES);
    let sums = pairs + (pairs >> 16);
    [(sums & 0x3ff) as usize, (sums >> 32 & 0x3ff) as usize]
}

/// Where a tensor's numbers begin (FNV-1a of its name, mixed with the seed).
fn stream(name: &str, seed: u64) -> u64 {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    mix(hash ^ mix(seed))
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014) at a
/// position.
fn mix(position: u64) -> u64 {
    let z = position.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(name: &str, shape: &[usize], seed: u64) -> Vec<f64> {
        let mut values = Vec::new();
        let write = |bytes: &[u8]| {
            values.extend(bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()));
            Ok::<(), ()>(())
        };
        make(name, shape, Float::Bf16, seed, write).unwrap();
        values
    }

    #[test]
    fn values_have_the_size_that_their_name_asks_for() {
        for (name, shape, mean, deviation) in [
            ("norm.weight", &[4096][..], 1., 0.05),
            ("norm1.linear.bias", &[4096], 0., 0.02),
            ("ff.net.2.weight", &[64, 1024], 0., 1. / 32.),
            ("encoder.conv_in.weight", &[128, 3, 3, 3], 0., 1. / 27f64.sqrt()),
            ("shared.weight", &[512, 64], 0., 1.),
        ] {
            let values = made(name, shape, 3);
            assert_eq!(values.len(), shape.iter().product::<usize>());
            let n = values.len() as f64;
            let found = values.iter().sum::<f64>() / n;
            let spread = (values.iter().map(|v| (v - found).powi(2)).sum::<f64>() / n).sqrt();
            // Five standard errors of either, and the steps of bf16.
            assert!((found - mean).abs() < 5. * deviation / n.sqrt() + 1e-3, "{name}: {found}");
            assert!((spread / deviation - 1.).abs() < 4. / n.sqrt() + 0.01, "{name}: {spread}");
        }
    }

    #[test]
    fn names_and_seeds_give_other_values_and_pieces_do_not() {
        let odd = [PIECE / 2 + 5];
        let values = made("a.bias", &odd, 1);
        assert_eq!(values, made("a.bias", &odd, 1));
        assert_eq!(values[..1001], made("a.bias", &[1001], 1));
        assert_ne!(values[..1001], made("a.bias", &[1001], 2));
        assert_ne!(values[..1001], made("b.bias", &[1001], 1));
        assert_ne!(values[..5], values[PIECE / 2..]);
    }

    #[test]
    fn halves_are_the_same_numbers_rounded_otherwise() {
        let mut halves = Vec::new();
        let write = |bytes: &[u8]| {
            halves.extend(bytes.chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f64()));
            Ok::<(), ()>(())
        };
        make("a.weight", &[40, 25], Float::F16, 1, write).unwrap();
        let others = made("a.weight", &[40, 25], 1);
        assert_eq!(halves.len(), others.len());
        assert_ne!(halves, others);
        assert!(halves.iter().zip(&others).all(|(a, b)| (a - b).abs() <= b.abs() / 200.));
    }
}
