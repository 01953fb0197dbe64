//! What happened: counters of a pager, and of the process around it.

use std::{cmp::Reverse, fmt, time::Duration};

use candle_core::DType;
use mmgp_io::Dtype;
use mmgp_quant::Codes;

use crate::{Bytes, Making, pager::NewBlock};

/// What one model needed.
#[derive(Clone, Debug)]
pub struct ModelReport {
    /// The model's name.
    pub name: String,
    /// The tensors in its files.
    pub disk: Bytes,
    /// Its weights as they lie in slots, with what is attached to them.
    pub weights: Bytes,
    /// Of them, what was attached, such as adapters.
    pub attached: Bytes,
    /// The dtypes in slots, the larger share first; codes of int8 are `u8`, those of e4m3 `fp8`.
    pub form: String,
    /// What the plan let it hold.
    pub limit: Bytes,
    /// The most that it held at once.
    pub peak: Bytes,
    /// What was read from files for it.
    pub read: Bytes,
    /// What was brought into slots that its blocks take turns in.
    pub streamed: Bytes,
    /// In how many copies all that was brought came.
    pub copies: u64,
    /// Leases of its stem and blocks.
    pub visits: u64,
    /// Of them, those that found the block there since an earlier visit.
    pub hits: u64,
    /// How long computing waited for blocks to arrive.
    pub stalled: Duration,
    /// What the pager itself takes of the computing thread's time in a pass under this plan: of each block, what its
    /// visits took at least. In others a call may have waited for room in the device's queue.
    pub own: Duration,
}

/// What a pager did.
#[derive(Clone, Debug)]
pub struct Report {
    /// The limit over all models; `u64::MAX` if there was none.
    pub budget: Bytes,
    /// The most weights that were on the device at once.
    pub peak: Bytes,
    /// Passes that came in another order than in the run before.
    pub deviations: u64,
    /// Host memory that is page-locked for blocks that stream.
    pub locked: Bytes,
    /// Copies to the device.
    pub copies: u64,
    /// What was brought into slots that blocks take turns in.
    pub streamed: Bytes,
    /// The pager's time on the thread that computes, without waiting for fetches, but with whatever its calls
    /// waited for room in the device's queue.
    pub host: Duration,
    /// How often that thread waited for a block to be fetched.
    pub waits: u64,
    /// How many slots were taken from the device.
    pub taken: u64,
    /// How often the plan changed between passes.
    pub replans: u64,
    /// How often a block ran again after memory was given back.
    pub reruns: u64,
    /// In the order in which models were added.
    pub models: Vec<ModelReport>,
}

/// What a steady pass of a model takes, by the schedule of its blocks and copies.
#[derive(Clone, Debug)]
pub struct Forecast {
    /// Bytes a second that reach the device, as copies showed.
    pub link: f64,
    /// What streams in a pass.
    pub streamed: Bytes,
    /// Seconds of a pass as it is planned.
    pub schedule: f64,
    /// Seconds of a pass by the best plan that was found within the same limit.
    pub best: f64,
    /// Seconds of a pass outside its blocks.
    pub outside: f64,
    /// Slots in which blocks take turns.
    pub slots: usize,
    /// In the order of the pass.
    pub blocks: Vec<BlockForecast>,
}

/// What one block contributes to a pass.
#[derive(Clone, Debug)]
pub struct BlockForecast {
    /// Its name.
    pub name: String,
    /// Its weights.
    pub bytes: Bytes,
    /// Seconds that it computes.
    pub seconds: f64,
    /// Whether it streams.
    pub streams: bool,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<18}{:>10}{:>10}  {:<10}{:>10}{:>10}{:>10}{:>8}{:>7}{:>10}",
            "model",
            "on disk",
            "in slots",
            "form",
            "budget",
            "held",
            "read",
            "visits",
            "hits",
            "stalled"
        )?;
        for m in &self.models {
            let limit = limit(m.limit);
            let stalled = format!("{:.3} s", m.stalled.as_secs_f64());
            writeln!(
                f,
                "{:<18}{:>10}{:>10}  {:<10}{:>10}{:>10}{:>10}{:>8}{:>7}{stalled:>10}",
                m.name, m.disk, m.weights, m.form, limit, m.peak, m.read, m.visits, m.hits
            )?;
        }
        let sum = |value: fn(&ModelReport) -> u64| Bytes(self.models.iter().map(value).sum());
        writeln!(
            f,
            "{:<18}{:>10}{:>10}  {:<10}{:>10}{:>10}{:>10}",
            "all",
            sum(|m| m.disk.0),
            sum(|m| m.weights.0),
            "",
            limit(self.budget),
            self.peak,
            sum(|m| m.read.0)
        )?;
        write!(
            f,
            "{} streamed, {} copies, {} page-locked; {} slots taken, {} new plans, {} blocks run again; \
             {} waits for a fetch, {:.3} s within the pager",
            self.streamed,
            self.copies,
            self.locked,
            self.taken,
            self.replans,
            self.reruns,
            self.waits,
            self.host.as_secs_f64()
        )
    }
}

fn limit(bytes: Bytes) -> String {
    if bytes.0 == u64::MAX { "none".into() } else { bytes.to_string() }
}

/// The most memory that this process had resident so far, its files' pages included, as the
/// operating system counts it; `None` where it does not.
pub fn process_peak() -> Option<Bytes> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(Bytes(kib * 1024))
}

/// The dtypes of a model's slots, the larger share first; e4m3, which travels as bytes, is `fp8`.
pub(crate) fn form(blocks: &[NewBlock]) -> String {
    let mut sizes: Vec<(u64, &'static str)> = Vec::new();
    for tensor in blocks.iter().flat_map(|b| &b.image.tensors) {
        let fp8 = tensor.making == Making::Codes(Codes::Fp8)
            || tensor.dtype == DType::U8
                && tensor.segments.iter().any(|s| s.source.dtype() == Dtype::F8E4M3);
        let dtype = if fp8 { Codes::Fp8.name() } else { tensor.dtype.as_str() };
        match sizes.iter_mut().find(|(_, name)| *name == dtype) {
            Some((bytes, _)) => *bytes += tensor.bytes(),
            None => sizes.push((tensor.bytes(), dtype)),
        }
    }
    sizes.sort_unstable_by_key(|(bytes, _)| Reverse(*bytes));
    sizes.iter().map(|(_, name)| *name).collect::<Vec<_>>().join("+")
}
