//! What a run leaves: `gpu.json`, written after every row, and `gpu.md`, the same as a table.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{
    chart,
    row::{BAR, BOUND, PLAN, Row},
    rows::{Form, Way},
};

/// A run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    /// Of its beginning, in UTC.
    pub(crate) date: String,
    pub(crate) card: String,
    pub(crate) driver: Option<String>,
    pub(crate) commit: Option<String>,
    pub(crate) version: String,
    /// Copies with nothing beside them.
    pub(crate) copies_alone: Vec<Copies>,
    /// Rows that could not be measured.
    pub(crate) failed: Vec<Failed>,
    pub(crate) rows: Vec<Row>,
}

/// Copies of the blocks that a row streams, nothing computed beside them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Copies {
    pub(crate) system: String,
    pub(crate) way: Way,
    pub(crate) form: Form,
    pub(crate) budget_bytes: Option<u64>,
    pub(crate) limit_gb_s: Option<f64>,
    /// The median of five.
    pub(crate) gb_s: f64,
}

/// A row without figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Failed {
    pub(crate) row: String,
    pub(crate) error: String,
}

/// What rows' schedules are made of, a line for each.
const PASSES: &str = "gpu-passes.jsonl";

/// Removes what an earlier run recorded.
///
/// # Errors
/// A folder that cannot be written to.
pub(crate) fn forget_passes(out: &Path) -> Result<()> {
    let path = out.join(PASSES);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Appends what a row's schedule is made of to `gpu-passes.jsonl`, if it has one.
///
/// # Errors
/// A folder that cannot be written to.
pub(crate) fn record(out: &Path, row: &Row) -> Result<()> {
    let Some(pass) = &row.pass else { return Ok(()) };
    let path = out.join(PASSES);
    let line = serde_json::to_string(pass)? + "\n";
    let file = fs::File::options().create(true).append(true).open(&path);
    file.and_then(|mut file| file.write_all(line.as_bytes()))
        .with_context(|| format!("{}", path.display()))
}

/// Writes a file of a run, as a whole: a run that is killed leaves what it had.
///
/// # Errors
/// A folder that cannot be written to.
pub(crate) fn put(out: &Path, name: &str, text: &str) -> Result<()> {
    let (path, part) = (out.join(name), out.join(format!("{name}.part")));
    fs::write(&part, text)
        .and_then(|()| fs::rename(&part, &path))
        .with_context(|| format!("{}", path.display()))
}

impl Results {
    /// No rows so far.
    pub(crate) fn new(card: String, driver: Option<String>, commit: Option<String>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self {
            date: date(now / 86400),
            card,
            driver,
            commit,
            version: env!("CARGO_PKG_VERSION").into(),
            copies_alone: Vec::new(),
            failed: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Those of an earlier run in `out`, if there are any.
    ///
    /// # Errors
    /// A file that holds something else.
    pub(crate) fn read(out: &Path) -> Result<Option<Self>> {
        let path = out.join("gpu.json");
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read(&path).with_context(|| format!("{}", path.display()))?;
        let read = serde_json::from_slice(&text);
        Ok(Some(read.with_context(|| format!("{}", path.display()))?))
    }

    /// Writes `gpu.json`, `gpu.md` and `gpu.svg`.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub(crate) fn write(&self, out: &Path) -> Result<()> {
        put(out, "gpu.json", &serde_json::to_string_pretty(self)?)?;
        put(out, "gpu.md", &self.table())?;
        put(out, "gpu.svg", &chart::svg(&self.rows))
    }

    /// The rows as markdown.
    pub(crate) fn table(&self) -> String {
        let or = |text: &Option<String>, none: &str| text.clone().unwrap_or_else(|| none.into());
        let mut out = format!(
            "# Streaming weights, {}\n\n{}, driver {}, commit {}, version {}.\n\n",
            self.date,
            self.card,
            or(&self.driver, "unknown"),
            or(&self.commit, "unknown"),
            self.version
        );
        out.push_str(
            "A step is one forward of the transformer. GB are 10^9 bytes, s and ms of one step, in the median of\n\
             groups of steps back to back. bound = max(resident, streamed / link), with the median of copies of\n\
             the same blocks beside resident steps, or the limit, as link; schedule = what the plan in force\n\
             can reach, from block times; beside copies = resident steps while the streamed blocks are copied; best = the schedule of the best plan of a search 100 times as long.\n\
             pager = of each block, what the pager takes of the computing thread's time at least; with waits = in\n\
             the mean, with waits for room in the device's queue. VRAM is all that is in use on the card less the resident model that is compared with, context and\n\
             activations included.\n\n",
        );
        out.push_str(
            "| system | tokens | form | budget GB | step s | resident s | beside copies s | bound s | schedule s | best s | / bound \
             | / schedule | streamed GB | link GB/s | copies | stall ms | pager ms | with waits ms | slots | resident blocks \
             | VRAM GB | locked GB | RSS GB | load s | same bytes |\n|---|--:|---|",
        );
        out.push_str(&"--:|".repeat(21));
        out.push_str("---|\n");
        for r in &self.rows {
            let some = |value: Option<f64>, digits: usize| {
                value.map_or("-".into(), |value| format!("{value:.digits$}"))
            };
            let gb = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64 / 1e9);
            let budget = gb(r.budget_bytes).map(|gb| (gb * 1e3).round() / 1e3);
            let budget = budget.map_or("resident".to_string(), |budget| budget.to_string());
            let over = if r.over_its_bar() { " (!)" } else { "" };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {budget} | **{:.4}** | {:.4} | {} | {:.4} | {} | {} | {:.3} | {}{over} | {:.2} \
                 | {} | {} | {:.1} | {:.2} | {:.2} | {} | {} | {} | {:.2} | {} | {:.1} | {} |",
                r.system,
                r.tokens,
                r.form.name(),
                r.step_s,
                r.resident_s,
                some(r.resident_beside_s, 4),
                r.bound_s,
                some(r.schedule_s, 4),
                some(r.schedule_best_s, 4),
                r.ratio,
                some(r.schedule_ratio, 3),
                r.streamed_bytes as f64 / 1e9,
                some(r.link_gb_s, 1),
                r.copies,
                r.stall_s * 1e3,
                r.own_ms,
                r.host_ms,
                r.slots,
                r.resident_blocks,
                some(gb(r.peak_vram_bytes), 2),
                r.locked_bytes as f64 / 1e9,
                some(gb(r.peak_rss_bytes), 1),
                r.load_s,
                if r.same_bytes { "yes" } else { "**NO**" },
            );
        }
        let over = self.rows.iter().filter(|r| r.over_its_bar()).count();
        let _ = writeln!(
            out,
            "\n{} of {} rows within {BAR} of their schedule, {PLAN} of the best plan and {BOUND} of the bound where resident step and \
             copies differ by more than a quarter (others are marked; each is the median of three).",
            self.rows.len() - over,
            self.rows.len()
        );
        if !self.copies_alone.is_empty() {
            out.push_str("\n| copies alone | form | budget GB | GB/s |\n|---|---|--:|--:|\n");
            for c in &self.copies_alone {
                let budget = c.budget_bytes.map_or(f64::NAN, |bytes| bytes as f64 / 1e9);
                let _ = writeln!(
                    out,
                    "| {} | {} | {budget} | {:.1} |",
                    c.system,
                    c.form.name(),
                    c.gb_s
                );
            }
        }
        for failed in &self.failed {
            let _ = writeln!(out, "\nNot measured: {}: {}", failed.row, failed.error);
        }
        out
    }
}

/// The civil date of a day, counted from 1970-01-01.
fn date(day: u64) -> String {
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let (mut rest, mut year) = (day, 1970);
    while rest >= 365 + u64::from(leap(year)) {
        rest -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if rest < days {
            break;
        }
        rest -= days;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::{Pass, tests::row};

    #[test]
    fn days_have_their_dates() {
        for (day, expected) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (789, "1972-02-29"),
            (11_016, "2000-02-29"),
            (20_422, "2025-11-30"),
            (20_423, "2025-12-01"),
            (20_453, "2025-12-31"),
        ] {
            assert_eq!(date(day), expected);
        }
    }

    #[test]
    fn a_run_that_was_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Results::read(dir.path()).unwrap().is_none());
        let mut results = Results::new("a card".into(), None, Some("0123456".into()));
        results.rows.push(row(Some(4.), 0.41));
        results.write(dir.path()).unwrap();
        let read = Results::read(dir.path()).unwrap().unwrap();
        assert_eq!(
            (read.rows, read.card, read.commit),
            (results.rows, results.card, results.commit)
        );
        fs::write(dir.path().join("gpu.json"), "{}").unwrap();
        let error = format!("{:#}", Results::read(dir.path()).unwrap_err());
        assert!(error.contains("gpu.json") && error.contains("date"), "{error}");
    }

    #[test]
    fn passes_are_recorded_a_line_each_until_they_are_forgotten() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let lines = || fs::read_to_string(dir.path().join(PASSES)).map(|text| text.lines().count());
        forget_passes(dir.path())?;
        let pass = Pass {
            row: "a row".into(),
            step_s: 0.4,
            outside_s: 0.,
            link: 5e10,
            slots: 2,
            blocks: vec![(1, 0.1, true)],
        };
        let row = Row { pass: Some(pass), ..row(Some(4.), 0.4) };
        record(dir.path(), &row)?;
        record(dir.path(), &row)?;
        record(dir.path(), &Row { pass: None, ..row })?;
        assert_eq!(lines()?, 2);
        forget_passes(dir.path())?;
        assert!(lines().is_err());
        Ok(())
    }

    #[test]
    fn tables_have_a_cell_for_every_column_and_mark_what_is_wrong() {
        let mut results = Results::new("a card".into(), Some("580".into()), None);
        results.rows = vec![row(Some(4.), 0.41), row(None, 0.43)];
        results.rows[1].same_bytes = false;
        results.rows[1].link_gb_s = None;
        let table = results.table();
        let lines: Vec<&str> = table.lines().filter(|l| l.starts_with('|')).collect();
        let cells: Vec<usize> = lines.iter().map(|line| line.matches('|').count()).collect();
        assert_eq!(cells, [26; 4], "{table}");
        assert!(lines[2].contains("| 4 | **0.4100**") && lines[2].ends_with("| yes |"));
        assert!(lines[3].contains("| resident |") && lines[3].contains("1.075 (!)"));
        assert!(lines[3].ends_with("| **NO** |"));
        assert!(table.contains("1 of 2 rows within 1.03"));
    }
}
