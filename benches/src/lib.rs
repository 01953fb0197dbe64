//! What the benches share: settings, and files of random weights.
//!
//! Each bench measures something of ours and, in the same run, what it is to be compared with;
//! `cargo xtask bench` runs them all and makes one table of the ratios. Weights are random, because
//! zeros multiply, copy and compress unlike weights do.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput};
use half::bf16;
use mmgp_io::{Dtype, Overwrite, Result, TensorSpec, Writer};

/// Few and short samples: medians of what takes milliseconds to seconds.
pub fn settings() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .without_plots()
}

/// Measures `ours` and `reference` in turn, so that whatever else the machine does meets both alike.
///
/// Criterion's own report is of `ours`. The pairs of seconds go to `pairs.json` in the group's folder
/// below `CRITERION_HOME`, if that is set: `cargo xtask bench` makes its table of them. `bytes` is
/// what either handles, where that is the point.
///
/// # Errors
/// A file that cannot be written.
pub fn compare(
    c: &mut Criterion,
    group: &str,
    bytes: Option<u64>,
    mut ours: impl FnMut(),
    mut reference: impl FnMut(),
) -> std::io::Result<()> {
    fn time(f: &mut impl FnMut()) -> Duration {
        let begun = Instant::now();
        f();
        begun.elapsed()
    }
    let mut pairs = Vec::new();
    let mut benches = c.benchmark_group(group);
    if let Some(bytes) = bytes {
        benches.throughput(Throughput::Bytes(bytes));
    }
    benches.bench_function("ours", |b| {
        b.iter_custom(|iterations| {
            let mut all = Duration::ZERO;
            for _ in 0..iterations {
                // Each follows the other's traces in the caches.
                let (a, b) = (time(&mut ours), time(&mut reference));
                pairs.push([a.as_secs_f64(), b.as_secs_f64()]);
                all += a;
            }
            all
        });
    });
    benches.finish();
    let Some(home) = env::var_os("CRITERION_HOME") else { return Ok(()) };
    let dir = PathBuf::from(home).join(group);
    fs::create_dir_all(&dir)?;
    let json = serde_json::json!({ "bytes": bytes, "pairs": pairs });
    fs::write(dir.join("pairs.json"), json.to_string())
}

/// `len` values spread evenly over (-1, 1).
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.
    };
    (0..len).map(|_| next()).collect()
}

/// Writes a checkpoint of random bf16 tensors.
///
/// # Errors
/// Those of [`Writer`].
pub fn write_random(path: &Path, tensors: &[(String, Vec<usize>)]) -> Result<()> {
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, shape)| TensorSpec::new(name, Dtype::BF16, shape.clone()))
        .collect();
    let mut writer = Writer::create(path, &specs, &BTreeMap::new(), Overwrite::Yes)?;
    for (seed, spec) in specs.iter().enumerate() {
        let values = random(spec.shape.iter().product(), seed as u64);
        let bytes: Vec<u8> =
            values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
        writer.write(&spec.name, &bytes)?;
    }
    writer.finish()
}
