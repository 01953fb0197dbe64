//! What happened: counters of a pager, and of the process around it.

use std::{fmt, time::Duration};

use crate::Bytes;

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
    /// The dtypes in slots, the larger share first.
    pub form: String,
    /// What the plan let it hold.
    pub limit: Bytes,
    /// The most that it held at once.
    pub peak: Bytes,
    /// What was read from files for it.
    pub read: Bytes,
    /// Leases of its stem and blocks.
    pub visits: u64,
    /// Of them, those that found the block there since an earlier visit.
    pub hits: u64,
    /// How long leases waited for a block to arrive.
    pub stalled: Duration,
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
    /// In the order in which models were added.
    pub models: Vec<ModelReport>,
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
        write!(
            f,
            "{:<18}{:>10}{:>10}  {:<10}{:>10}{:>10}{:>10}",
            "all",
            sum(|m| m.disk.0),
            sum(|m| m.weights.0),
            "",
            limit(self.budget),
            self.peak,
            sum(|m| m.read.0)
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
