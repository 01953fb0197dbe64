//! The comparison with other systems, from the lines that `benches/peers/compare.py` left: `peers.json`,
//! `peers.md` with the table and what is judged, and `peers.svg`.
//!
//! A line is a process. Those of another system are taken together; ours stand for themselves, and beside
//! each other system the fastest of ours that took no more of the card is held against it.

mod picture;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{results::put, row::bound, rows::Form};

/// What a row of ours is called, before its form.
const OURS: &str = "ours_";
/// The row whose step is the least that other systems compute.
const EAGER: &str = "pytorch";
/// Two blocks in bf16 do not fit what the smallest of the others takes, which holds single layers.
const LEAST: (&str, u64) = ("diffusers_leaf", 2_700_000_000);

/// One process, as it was measured.
#[derive(Clone, Debug, Deserialize)]
struct Line {
    row: String,
    system: String,
    form: Form,
    workload: String,
    at: String,
    card: Option<String>,
    driver: Option<String>,
    machine: Option<String>,
    commit: Option<String>,
    budget_bytes: Option<u64>,
    link_gb_s: Option<f64>,
    load_s: Option<f64>,
    first_step_s: Option<f64>,
    step_s: Option<f64>,
    streamed_bytes: Option<u64>,
    peak_vram_bytes: Option<u64>,
    peak_rss_bytes: Option<u64>,
    locked_bytes: Option<u64>,
    /// The fastest kernel, where several were tried.
    attention: Option<String>,
    output: Option<String>,
    error: Option<String>,
    #[serde(default)]
    versions: BTreeMap<String, String>,
}

/// A system under one budget.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Entry {
    row: String,
    system: String,
    form: Form,
    budget_bytes: Option<u64>,
    /// Until the first step is over, imports and the device's context not counted.
    load_s: Option<f64>,
    step_s: f64,
    bound_s: Option<f64>,
    ratio: Option<f64>,
    streamed_bytes: Option<u64>,
    /// The smallest of its processes.
    peak_vram_bytes: Option<u64>,
    peak_rss_bytes: Option<u64>,
    locked_bytes: Option<u64>,
    processes: usize,
    machines: BTreeSet<String>,
}

/// What a ratio must be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bar {
    /// The other's step to ours, at least.
    Faster(f64),
    /// Ours to the other's, at most.
    AtMost(f64),
}

/// A ratio that is held against its bar.
#[derive(Debug, PartialEq, Serialize)]
struct Verdict {
    other: String,
    ours: String,
    ratio: f64,
    bar: String,
    met: bool,
    same_machine: bool,
}

/// What is judged: the other's row, the form of ours, and the bar.
const JUDGED: [(&str, Form, Bar); 16] = {
    use Bar::{AtMost, Faster};
    use Form::{Bf16, Int8};
    [
        ("mmgp_int8_1200", Int8, Faster(3.)),
        ("mmgp_int8_1200_repaired", Int8, Faster(1.75)),
        ("mmgp_int8_4000", Int8, Faster(3.4)),
        ("mmgp_int8_4000_repaired", Int8, Faster(2.1)),
        ("mmgp_int8_8000", Int8, Faster(5.)),
        ("mmgp_int8_8000_repaired", Int8, Faster(4.2)),
        ("mmgp_bf16_4000", Bf16, Faster(1.95)),
        ("mmgp_bf16_4000_repaired", Bf16, Faster(1.06)),
        ("mmgp_bf16_12000", Bf16, Faster(2.1)),
        ("mmgp_bf16_12000_repaired", Bf16, Faster(1.2)),
        ("diffusers_block", Bf16, Faster(1.15)),
        ("diffusers_leaf", Bf16, Faster(1.1)),
        ("diffusers_block", Int8, Faster(2.2)),
        (EAGER, Bf16, AtMost(0.7)),
        ("pytorch_compiled", Bf16, AtMost(0.95)),
        ("ours_bf16", Int8, AtMost(0.75)),
    ]
};

/// A comparison.
#[derive(Debug, Serialize)]
struct Comparison {
    date: String,
    workload: String,
    card: Option<String>,
    driver: Option<String>,
    commit: Option<String>,
    version: &'static str,
    versions: BTreeMap<String, String>,
    machines: usize,
    link_gb_s: Option<f64>,
    /// By form, and by what they take of the card.
    rows: Vec<Entry>,
    judged: Vec<Verdict>,
    /// Whether all outputs of ours in a form have the same bits.
    same_bytes: bool,
    failed: Vec<String>,
}

/// Reads the lines and writes what is made of them.
///
/// # Errors
/// A file without rows, or of something else; a folder that cannot be written to.
pub(crate) fn write(lines: &Path, out: &Path) -> Result<()> {
    let text = fs::read_to_string(lines).with_context(|| format!("{}", lines.display()))?;
    let lines: Vec<Line> = text
        .lines()
        .enumerate()
        .map(|(at, line)| serde_json::from_str(line).with_context(|| format!("line {}", at + 1)))
        .collect::<Result<_>>()
        .with_context(|| format!("{}", lines.display()))?;
    ensure!(!lines.is_empty(), "no rows to compare");
    fs::create_dir_all(out).with_context(|| format!("{}", out.display()))?;
    let comparison = Comparison::new(&lines);
    put(out, "peers.json", &serde_json::to_string_pretty(&comparison)?)?;
    put(out, "peers.md", &comparison.table())?;
    put(out, "peers.svg", &picture::svg(&comparison.rows, &comparison.workload))?;
    println!("{}", comparison.table());
    eprintln!("{}/peers.json, peers.md and peers.svg", out.display());
    Ok(())
}

impl Comparison {
    fn new(lines: &[Line]) -> Self {
        let first = lines.first();
        let good: Vec<&Line> = lines.iter().filter(|line| line.step_s.is_some()).collect();
        let link_gb_s = middle(good.iter().filter_map(|line| line.link_gb_s));
        let all = entries(&good, link_gb_s);
        let judged: Vec<(Verdict, &Entry, &Entry)> = JUDGED
            .iter()
            .filter_map(|(other, form, bar)| {
                let other = match other.strip_prefix(OURS) {
                    Some(_) => ours(&all).find(|e| e.row == *other && e.budget_bytes.is_none()),
                    None => all.iter().find(|entry| entry.row == *other),
                }?;
                let ours = match bar {
                    Bar::Faster(_) => partner(&all, other, *form)?,
                    Bar::AtMost(_) => {
                        ours(&all).find(|e| e.form == *form && e.budget_bytes.is_none())?
                    }
                };
                Some((verdict(other, ours, *bar), other, ours))
            })
            .collect();
        // Tries that missed what they were held against are no rows.
        let mut kept: Vec<&Entry> = judged.iter().map(|(.., ours)| *ours).collect();
        kept.extend(others(&all).filter_map(|other| partner(&all, other, other.form)));
        let stays = |entry: &&Entry| {
            let ours = entry.is_ours() && entry.budget_bytes.is_some();
            !ours || kept.iter().any(|kept| std::ptr::eq(*kept, *entry))
        };
        let mut rows: Vec<Entry> = all.iter().filter(stays).cloned().collect();
        rows.sort_by_key(|entry| (entry.form == Form::Int8, entry.peak_vram_bytes.unwrap_or(0)));
        let judged = judged.into_iter().map(|(verdict, ..)| verdict).collect();
        let of = |what: fn(&Line) -> Option<&String>| lines.iter().find_map(what).cloned();
        let outputs = |form: Form| -> BTreeSet<&String> {
            good.iter().filter(|l| l.form == form).filter_map(|l| l.output.as_ref()).collect()
        };
        let failed = lines.iter().filter_map(|line| {
            // A row that another process measured is there.
            let measured = !line.row.starts_with(OURS) && good.iter().any(|l| l.row == line.row);
            let error = line.error.as_ref().filter(|_| !measured)?;
            Some(format!("{}, {}: {error}", line.system, line.form.name()))
        });
        let machines: BTreeSet<&String> = lines.iter().filter_map(|l| l.machine.as_ref()).collect();
        Self {
            date: first.and_then(|line| line.at.get(..10)).unwrap_or("unknown").into(),
            workload: first.map_or_else(String::new, |line| line.workload.clone()),
            card: of(|line| line.card.as_ref()),
            driver: of(|line| line.driver.as_ref()),
            commit: of(|line| line.commit.as_ref()),
            version: env!("CARGO_PKG_VERSION"),
            versions: lines.iter().flat_map(|line| line.versions.clone()).collect(),
            machines: machines.len(),
            link_gb_s,
            rows,
            judged,
            same_bytes: [Form::Bf16, Form::Int8].iter().all(|&form| outputs(form).len() <= 1),
            failed: failed.collect(),
        }
    }

    /// The rows as markdown, and below them what is judged.
    fn table(&self) -> String {
        let or = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".into());
        let versions: Vec<String> = self.versions.iter().map(|(n, v)| format!("{n} {v}")).collect();
        let mut out = format!(
            "# Other systems and ours, {}\n\n{}. {}, driver {}, commit {}, version {}; {}.\n\n",
            self.date,
            self.workload,
            or(&self.card),
            or(&self.driver),
            or(&self.commit),
            self.version,
            versions.join(", ")
        );
        let link = self.link_gb_s.map_or("unknown".into(), |link| format!("{link:.1} GB/s"));
        let _ = writeln!(
            out,
            "A step is one forward of the transformer with a wait for the device before and after, in the median of six\n\
             after four. Every row is a process of its own, several of one system their median (of two, the mean); all read\n\
             the same weights. load = until the first step is over, without imports and the device's context. bound =\n\
             max(resident, streamed / link): link = the median of all rows' own, {link}; resident = PyTorch's eager step for the others,\n\
             for ours its own in the same form. VRAM = the most in use on the card during steps, less what was before the process; RSS\n\
             counts mapped files. GB are 10^9 bytes.\n"
        );
        if self.machines > 1 {
            let _ = writeln!(
                out,
                "**The rows come from {} machines**: see what is judged.\n",
                self.machines
            );
        }
        out.push_str(
            "| system | form | step s | bound s | / bound | VRAM GB | load s | streamed GB | RSS GB | locked GB | processes |\n\
             |---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
        );
        for entry in &self.rows {
            let some = |value: Option<f64>, digits: usize| {
                value.map_or("-".into(), |value| format!("{value:.digits$}"))
            };
            let gb = |bytes: Option<u64>, digits| some(bytes.map(|b| b as f64 / 1e9), digits);
            let _ = writeln!(
                out,
                "| {} | {} | **{:.4}** | {} | {} | {} | {} | {} | {} | {} | {} |",
                entry.told(),
                entry.form.name(),
                entry.step_s,
                some(entry.bound_s, 4),
                some(entry.ratio, 2),
                gb(entry.peak_vram_bytes, 2),
                some(entry.load_s, 1),
                gb(entry.streamed_bytes, 2),
                gb(entry.peak_rss_bytes, 1),
                gb(entry.locked_bytes, 2),
                entry.processes,
            );
        }
        out.push_str(
            "\nJudged: how many times as fast ours is at no more VRAM (beside diffusers by leaf, at no more than 2.7 GB), and,\n\
             with all weights on the card, the part of the other's time that ours takes. diffusers offloads groups in bf16 alone: ours in\n\
             int8 is held against that. In int8 ours multiplies int8 by int8, where the others expand weights to bf16.\n\n\
             | other | ours | ratio | bar | |\n|---|---|--:|--:|---|\n",
        );
        for verdict in &self.judged {
            let _ = writeln!(
                out,
                "| {} | {} | {:.2} | {} | {}{} |",
                verdict.other,
                verdict.ours,
                verdict.ratio,
                verdict.bar,
                if verdict.met { "met" } else { "**MISSED**" },
                if verdict.same_machine { "" } else { ", two machines" },
            );
        }
        let met = self.judged.iter().filter(|verdict| verdict.met).count();
        let _ = writeln!(
            out,
            "\n{met} of {} bars met, {} not judged for want of rows. Outputs of ours in a form have {} bits under all budgets.",
            self.judged.len(),
            JUDGED.len() - self.judged.len(),
            if self.same_bytes { "the same" } else { "**OTHER**" }
        );
        for failed in &self.failed {
            let _ = writeln!(out, "\nNot measured: {failed}");
        }
        out.push_str(
            "\nNot run, measured on an H100 80GB HBM3 on 2026-11-23 with torch 2.11.0 and diffusers 0.42.1 in the same shape, where PyTorch's\n\
             eager step took 0.183 s: int8 weights of optimum-quanto 0.2.7, resident, 0.248 s and 25.03 GB; of torchao 0.18.0 0.257 s and 25.65 GB.\n",
        );
        out
    }
}

impl Entry {
    fn is_ours(&self) -> bool {
        self.row.starts_with(OURS)
    }

    /// The system, and the budget where its name has none.
    fn told(&self) -> String {
        match (self.is_ours(), self.budget_bytes) {
            (true, Some(bytes)) => format!("**ours**, {:.2} GB for weights", bytes as f64 / 1e9),
            (true, None) => "**ours**, resident".into(),
            _ => self.system.clone(),
        }
    }
}

/// Lines of a system and a budget together, in the order of their first.
fn entries(lines: &[&Line], link: Option<f64>) -> Vec<Entry> {
    let mut groups: Vec<Vec<&Line>> = Vec::new();
    for &line in lines {
        let same = |group: &&mut Vec<&Line>| {
            (&group[0].row, group[0].budget_bytes) == (&line.row, line.budget_bytes)
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.push(line),
            None => groups.push(vec![line]),
        }
    }
    let resident = |row: &str| {
        let lines = lines.iter().filter(|line| line.row == row && line.streamed_bytes == Some(0));
        middle(lines.filter_map(|line| line.step_s))
    };
    let entry = |group: Vec<&Line>| {
        let line = group[0];
        let of =
            |what: fn(&Line) -> Option<f64>| middle(group.iter().filter_map(|line| what(line)));
        let bytes =
            |what: fn(&Line) -> Option<u64>| group.iter().filter_map(move |line| what(line));
        let step_s = of(|line| line.step_s)?;
        let streamed_bytes = bytes(|line| line.streamed_bytes).max();
        let resident = resident(if line.row.starts_with(OURS) { &line.row } else { EAGER });
        let bound_s = resident.zip(streamed_bytes).and_then(|(resident, streamed)| {
            let link = (streamed == 0).then_some(f64::INFINITY).or(link)?;
            Some(bound(resident, streamed, Some(link * 1e9)))
        });
        let attention = line.attention.as_ref().map(|name| format!(", attention {name}"));
        Some(Entry {
            row: line.row.clone(),
            system: line.system.clone() + &attention.unwrap_or_default(),
            form: line.form,
            budget_bytes: line.budget_bytes,
            load_s: of(|line| Some(line.load_s? + line.first_step_s?)),
            step_s,
            bound_s,
            ratio: bound_s.map(|bound| step_s / bound),
            streamed_bytes,
            peak_vram_bytes: match line.row.starts_with(OURS) {
                true => bytes(|line| line.peak_vram_bytes).max(),
                false => bytes(|line| line.peak_vram_bytes).min(),
            },
            peak_rss_bytes: bytes(|line| line.peak_rss_bytes).max(),
            locked_bytes: bytes(|line| line.locked_bytes).max(),
            processes: group.len(),
            machines: group.iter().filter_map(|line| line.machine.clone()).collect(),
        })
    };
    groups.into_iter().filter_map(entry).collect()
}

fn ours(all: &[Entry]) -> impl Iterator<Item = &Entry> {
    all.iter().filter(|entry| entry.is_ours())
}

/// The other systems that stream.
fn others(all: &[Entry]) -> impl Iterator<Item = &Entry> {
    all.iter().filter(|entry| !entry.is_ours() && entry.streamed_bytes != Some(0))
}

/// The fastest of ours in a form that takes no more of the card than the other does.
fn partner<'a>(all: &'a [Entry], other: &Entry, form: Form) -> Option<&'a Entry> {
    let most = other.peak_vram_bytes?;
    let most = if other.row == LEAST.0 { most.max(LEAST.1) } else { most };
    ours(all)
        .filter(|entry| entry.form == form && entry.peak_vram_bytes.is_some_and(|b| b <= most))
        .min_by(|a, b| a.step_s.total_cmp(&b.step_s))
}

fn verdict(other: &Entry, ours: &Entry, bar: Bar) -> Verdict {
    let told = |entry: &Entry| {
        let vram = entry.peak_vram_bytes.map(|bytes| format!(" ({:.2} GB)", bytes as f64 / 1e9));
        format!("{}, {}{}", entry.told(), entry.form.name(), vram.unwrap_or_default())
    };
    let (ratio, shown, met) = match bar {
        Bar::Faster(bar) => {
            let ratio = other.step_s / ours.step_s;
            (ratio, format!("≥ {bar}"), ratio >= bar)
        }
        Bar::AtMost(bar) => {
            let ratio = ours.step_s / other.step_s;
            (ratio, format!("≤ {bar}"), ratio <= bar)
        }
    };
    let same_machine = other.machines.union(&ours.machines).count() <= 1;
    Verdict { other: told(other), ours: told(ours), ratio, bar: shown, met, same_machine }
}

/// The value in the middle, the mean of two that are there.
fn middle(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some((lower + upper) / 2.)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(row: &str, form: &str, gb: f64, step_s: f64, budget: Option<u64>) -> Line {
        let resident =
            row == EAGER || row == "pytorch_compiled" || budget.is_none() && row.starts_with(OURS);
        serde_json::from_value(json!({
            "row": row, "system": row, "form": form, "workload": "FLUX.1-dev", "at": "2026-11-28T01:02:03+00:00",
            "card": "a card", "driver": "580", "machine": "one", "commit": "0123", "budget_bytes": budget,
            "link_gb_s": 50., "load_s": 2., "first_step_s": 1., "step_s": step_s,
            "streamed_bytes": if resident { 0 } else { 10_000_000_000u64 },
            "peak_vram_bytes": (gb * 1e9) as u64, "peak_rss_bytes": 1, "locked_bytes": 2,
            "versions": { "torch": "2.11.0" }, "output": row.strip_prefix(OURS),
        }))
        .unwrap()
    }

    fn some() -> Vec<Line> {
        vec![
            line("ours_bf16", "bf16", 25., 0.12, None),
            line("ours_int8", "int8", 13., 0.08, None),
            line(EAGER, "bf16", 25.7, 0.18, None),
            line("mmgp_int8_1200", "int8", 2.4, 0.7, Some(1200 << 20)),
            line("ours_int8", "int8", 2.5, 0.2, Some(1_400_000_000)),
            line("ours_int8", "int8", 2.3, 0.21, Some(1_200_000_000)),
            line("diffusers_leaf", "bf16", 2.37, 0.52, None),
            line("ours_bf16", "bf16", 2.7, 0.43, Some(1_500_000_000)),
            line("mmgp_int8_1200", "int8", 2.5, 0.8, Some(1200 << 20)),
        ]
    }

    #[test]
    fn each_other_row_stands_beside_the_fastest_of_ours_within_its_memory() {
        let comparison = Comparison::new(&some());
        let rows: Vec<(&str, Option<u64>)> =
            comparison.rows.iter().map(|e| (e.row.as_str(), e.budget_bytes)).collect();
        let expected = [
            ("diffusers_leaf", None),
            ("ours_bf16", Some(1_500_000_000)),
            ("ours_bf16", None),
            (EAGER, None),
            ("ours_int8", Some(1_200_000_000)),
            ("mmgp_int8_1200", Some(1200 << 20)),
            ("ours_int8", None),
        ];
        assert_eq!(rows, expected);
        let judged: Vec<(f64, bool)> =
            comparison.judged.iter().map(|v| ((v.ratio * 1e3).round(), v.met)).collect();
        // 0.75 of two processes to 0.21; 0.52 to 0.43; 0.12 to 0.18; 0.08 to 0.12.
        assert_eq!(judged, [(3571., true), (1209., true), (667., true), (667., true)]);
        let mmgp = comparison.rows.iter().find(|e| e.row == "mmgp_int8_1200").unwrap();
        assert_eq!((mmgp.processes, mmgp.peak_vram_bytes), (2, Some(2_400_000_000)));
        assert_eq!((mmgp.load_s, mmgp.bound_s), (Some(3.), Some(0.2)));
        let least = comparison.rows.iter().find(|e| e.is_ours()).unwrap();
        assert_eq!(least.bound_s, Some(0.2));
    }

    #[test]
    fn tables_have_a_cell_for_every_column_and_tell_what_is_wrong() {
        let mut lines = some();
        lines[5].machine = Some("another".into());
        lines[5].output = Some("other bits".into());
        let error = Some("no memory".into());
        lines.push(Line { step_s: None, error: error.clone(), ..lines[6].clone() });
        let row = "diffusers_block".to_string();
        lines.push(Line { step_s: None, system: row.clone(), row, error, ..lines[6].clone() });
        let table = Comparison::new(&lines).table();
        let cells = |header: &str| {
            let lines = table.lines().skip_while(|line| !line.starts_with(header));
            let lines = lines.take_while(|line| line.starts_with('|'));
            lines.map(|line| line.matches('|').count()).collect::<Vec<_>>()
        };
        assert_eq!(cells("| system"), [12; 9], "{table}");
        assert_eq!(cells("| other"), [6; 6], "{table}");
        assert!(table.contains("come from 2 machines") && table.contains("met, two machines"));
        assert!(table.contains("4 of 4 bars met, 12 not judged") && table.contains("**OTHER**"));
        assert!(!table.contains("Not measured: diffusers_leaf"));
        assert!(table.contains("Not measured: diffusers_block, bf16: no memory"));
    }

    #[test]
    fn a_bar_that_is_missed_is_told() {
        let mut lines = some();
        lines[0].step_s = Some(0.17);
        let table = Comparison::new(&lines).table();
        assert!(table.contains("| 0.94 | ≤ 0.7 | **MISSED** |"), "{table}");
    }

    #[test]
    fn files_of_something_else_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let lines = dir.path().join("peers.jsonl");
        let wrong = |text: &str| {
            fs::write(&lines, text).unwrap();
            format!("{:#}", write(&lines, dir.path()).unwrap_err())
        };
        assert!(wrong("").contains("no rows"));
        let error = wrong("{}\n");
        assert!(error.contains("peers.jsonl: line 1: missing field"), "{error}");
    }
}
