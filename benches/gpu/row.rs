//! A row of the table: what was measured, and the two times that it is held against.
//!
//! The *bound* is `max(resident step, bytes streamed / link)`: nothing is faster. The *schedule* is what the
//! plan in force can reach at most, as the pager computes it from block times. The engine is judged by
//! the ratio to the schedule, the planner by how near the schedule comes to the bound.

use mmgp_residency::Forecast;
use serde::{Deserialize, Serialize};

use crate::rows::Form;

/// A row is measured twice more where its step takes more than this many times its schedule, ...
pub(crate) const BAR: f64 = 1.03;
/// ... its schedule more than this many times the best that a longer search finds, ...
pub(crate) const PLAN: f64 = 1.01;
/// ... or its step more than this many times the bound, where resident step and copies differ by more than a quarter.
pub(crate) const BOUND: f64 = 1.05;

/// A row as it stands in `gpu.json`; bytes, seconds and bytes moved are of one step unless said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// This project, with the ring or the limit on the link if there was one.
    pub(crate) system: String,
    /// The model.
    pub(crate) workload: String,
    /// Picture's and text's tokens.
    pub(crate) tokens: usize,
    pub(crate) form: Form,
    /// What the weights on the device may take; none for a run with all of them.
    pub(crate) budget_bytes: Option<u64>,
    /// Median of copies of the streamed blocks beside resident steps, or the limit; none if nothing streams.
    pub(crate) link_gb_s: Option<f64>,
    /// Opening the model, planning and the first step, in which weights are read and page-locked.
    pub(crate) load_s: f64,
    /// Median of `step_times`.
    pub(crate) step_s: f64,
    /// Median of resident steps between the groups.
    pub(crate) resident_s: f64,
    pub(crate) streamed_bytes: u64,
    pub(crate) bound_s: f64,
    /// None if the pager has measured no pass.
    pub(crate) schedule_s: Option<f64>,
    /// Step to bound.
    pub(crate) ratio: f64,
    /// The most memory in use on the card while the row loaded and warmed up, less the resident model.
    pub(crate) peak_vram_bytes: Option<u64>,
    /// The process's, mapped files included.
    pub(crate) peak_rss_bytes: Option<u64>,
    pub(crate) locked_bytes: u64,
    pub(crate) copies: u64,
    /// How long leases waited on the host for a block.
    pub(crate) stall_s: f64,
    /// Whether every output had the bytes of the resident step's.
    pub(crate) same_bytes: bool,
    /// Step to schedule.
    pub(crate) schedule_ratio: Option<f64>,
    /// The schedule of the best plan that a search a hundred times as long finds.
    pub(crate) schedule_best_s: Option<f64>,
    /// What the pager itself takes of the computing thread's time, of each block the least of its visits.
    pub(crate) own_ms: f64,
    /// The same in the mean of steps, with waits for room in the device's queue.
    pub(crate) host_ms: f64,
    /// Slots in which blocks take turns.
    pub(crate) slots: usize,
    pub(crate) resident_blocks: usize,
    /// Median of resident steps while the streamed blocks are copied beside them; none under a limit.
    pub(crate) resident_beside_s: Option<f64>,
    /// Seconds per step, one for each group of steps back to back.
    pub(crate) step_times: Vec<f64>,
    /// What its schedule was made of; stands in a file of its own.
    #[serde(skip)]
    pub(crate) pass: Option<Pass>,
}

/// A pass as it was measured and what its schedule is made of: a line of `gpu-passes.jsonl`, on which the
/// pager's tests hold the recurrence to what a card did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Pass {
    pub(crate) row: String,
    /// Median seconds of a step.
    pub(crate) step_s: f64,
    /// Seconds outside blocks.
    pub(crate) outside_s: f64,
    /// Bytes a second, as the pager's own copies showed.
    pub(crate) link: f64,
    /// Slots in which blocks take turns.
    pub(crate) slots: usize,
    /// Of each block its bytes, its seconds, and whether it streams.
    pub(crate) blocks: Vec<(u64, f64, bool)>,
}

impl Pass {
    pub(crate) fn of(row: String, step_s: f64, forecast: &Forecast) -> Self {
        let tenth_of_us = |seconds: f64| (seconds * 1e7).round() / 1e7;
        let blocks = forecast.blocks.iter();
        Self {
            row,
            step_s: tenth_of_us(step_s),
            outside_s: tenth_of_us(forecast.outside),
            link: forecast.link.round(),
            slots: forecast.slots,
            blocks: blocks.map(|b| (b.bytes.0, tenth_of_us(b.seconds), b.streams)).collect(),
        }
    }
}

impl Row {
    /// Whether the row must be measured again.
    pub(crate) fn over_its_bar(&self) -> bool {
        self.nearest_bar() > 1.
    }

    /// The largest of the row's ratios, each as a part of what it may be.
    fn nearest_bar(&self) -> f64 {
        let plan = self.schedule_s.zip(self.schedule_best_s).map(|(plan, best)| plan / best);
        let copies = self.link_gb_s.map_or(0., |link| self.streamed_bytes as f64 / (link * 1e9));
        let apart = !(0.8..=1.25).contains(&(copies / self.resident_s));
        let bars = [
            self.schedule_ratio.map(|ratio| ratio / BAR),
            plan.map(|ratio| ratio / PLAN),
            apart.then_some(self.ratio / BOUND),
        ];
        bars.into_iter().flatten().fold(0., f64::max)
    }

    /// Of three measurements of one row the one in the middle by how near it came to a bar, with the largest
    /// peaks; the bytes must be the same in all.
    pub(crate) fn median(mut all: Vec<Self>) -> Option<Self> {
        all.sort_by(|a, b| a.nearest_bar().total_cmp(&b.nearest_bar()));
        let mut row = all.get(all.len() / 2)?.clone();
        row.same_bytes = all.iter().all(|r| r.same_bytes);
        row.peak_vram_bytes = all.iter().filter_map(|r| r.peak_vram_bytes).max();
        row.peak_rss_bytes = all.iter().filter_map(|r| r.peak_rss_bytes).max();
        Some(row)
    }
}

/// `max(resident step, bytes streamed / link)`, the link in bytes per second.
pub(crate) fn bound(resident_s: f64, streamed: u64, link: Option<f64>) -> f64 {
    link.map_or(resident_s, |link| resident_s.max(streamed as f64 / link))
}

/// What a plan may stream in a step at most, whatever it keeps: a wasteful plan must not lower the bar.
pub(crate) fn most_streamed(
    budget: Option<u64>,
    stem: u64,
    blocks: &[u64],
    largest_expansion: u64,
) -> u64 {
    let Some(budget) = budget else { return 0 };
    let all: u64 = stem + blocks.iter().sum::<u64>();
    let largest = blocks.iter().copied().max().unwrap_or(0);
    let smallest = blocks.iter().copied().min().unwrap_or(0);
    (all + 2 * largest + stem + smallest + largest_expansion).saturating_sub(budget)
}

/// The value in the middle, the upper one of two; NaN of nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A row of bf16 with its budget in GB.
    pub(crate) fn row(budget: Option<f64>, step_s: f64) -> Row {
        Row {
            system: "mmgp".into(),
            workload: "FLUX.1-dev".into(),
            tokens: 1536,
            form: Form::Bf16,
            budget_bytes: budget.map(|gb| (gb * 1e9) as u64),
            link_gb_s: Some(50.),
            load_s: 1.5,
            step_s,
            resident_s: 0.2,
            streamed_bytes: 20_000_000_000,
            bound_s: 0.4,
            schedule_s: Some(0.4),
            ratio: step_s / 0.4,
            peak_vram_bytes: Some(1),
            peak_rss_bytes: Some(2),
            locked_bytes: 3,
            copies: 57,
            stall_s: 0.,
            same_bytes: true,
            schedule_ratio: Some(step_s / 0.4),
            schedule_best_s: Some(0.399),
            own_ms: 0.4,
            host_ms: 0.5,
            slots: 2,
            resident_blocks: 3,
            resident_beside_s: Some(0.21),
            step_times: vec![step_s; 3],
            pass: None,
        }
    }

    #[test]
    fn the_bound_is_the_longer_of_computing_and_copying() {
        assert_eq!(bound(0.2, 22_000_000_000, Some(55e9)), 0.4);
        assert_eq!(bound(0.5, 22_000_000_000, Some(55e9)), 0.5);
        assert_eq!(bound(0.5, 0, None), 0.5);
    }

    #[test]
    fn a_plan_may_stream_what_does_not_fit_and_what_it_needs_to_stream() {
        // Two slots of the largest, the stem, and room that the smallest block does not fit.
        assert_eq!(
            most_streamed(Some(100), 10, &[50, 30, 40], 7),
            10 + 120 + 100 + 10 + 30 + 7 - 100
        );
        assert_eq!(most_streamed(Some(1000), 10, &[50, 30, 40], 7), 0);
        assert_eq!(most_streamed(None, 10, &[50], 7), 0);
    }

    #[test]
    fn a_row_over_its_bar_counts_with_the_median_of_three() {
        assert!(!row(Some(4.), 0.41).over_its_bar());
        assert!(row(Some(4.), 0.42).over_its_bar());
        let none = Row { schedule_ratio: None, ..row(Some(4.), 0.42) };
        assert!(!none.over_its_bar());
        // The bound, unless copies take about as long as the resident step.
        assert!(Row { ratio: 1.06, ..none.clone() }.over_its_bar());
        assert!(!Row { ratio: 1.06, resident_s: 0.35, ..none.clone() }.over_its_bar());
        assert!(Row { ratio: 1.06, streamed_bytes: 0, ..none.clone() }.over_its_bar());
        // The plan.
        assert!(!Row { schedule_best_s: Some(0.3965), ..none.clone() }.over_its_bar());
        assert!(Row { schedule_best_s: Some(0.395), ..none }.over_its_bar());

        let mut all = vec![row(Some(4.), 0.5), row(Some(4.), 0.41), row(Some(4.), 0.43)];
        all[1].peak_vram_bytes = Some(9);
        let chosen = Row::median(all.clone()).unwrap();
        assert_eq!((chosen.step_s, chosen.peak_vram_bytes), (0.43, Some(9)));
        assert!(chosen.same_bytes);
        all[0].same_bytes = false;
        assert!(!Row::median(all).unwrap().same_bytes);
        assert_eq!(Row::median(Vec::new()), None);
    }

    #[test]
    fn a_row_has_the_names_that_tables_of_other_systems_have() {
        let json = serde_json::to_value(row(None, 0.4)).unwrap();
        let mut names: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected: Vec<&str> =
            "system workload tokens form budget_bytes link_gb_s load_s step_s \
            resident_s streamed_bytes bound_s schedule_s ratio peak_vram_bytes peak_rss_bytes \
            locked_bytes copies stall_s same_bytes schedule_ratio schedule_best_s own_ms host_ms slots \
            resident_blocks resident_beside_s step_times"
                .split_whitespace()
                .collect();
        names.sort_unstable();
        expected.sort_unstable();
        assert_eq!(names, expected);
        assert_eq!(json["form"], "bf16");
        assert_eq!(serde_json::from_value::<Row>(json).unwrap(), row(None, 0.4));
    }
}
