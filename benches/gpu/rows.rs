//! Which rows are measured: a form, a budget, a number of tokens, a limit on the link, and the way that
//! streamed blocks take through host memory.
//!
//! [`Set`] names the tables; rows that share a form and a way share the models and stand together, short
//! sequences first, so that memory which the device keeps for activations grows with them.

use mmgp_residency::{Budget, Bytes};
use serde::{Deserialize, Serialize};

use crate::adapters::Loras;

/// What weights are in files and slots.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Form {
    /// As they were made.
    Bf16,
    /// Weights of linear layers in blocks as int8 with a scale per row.
    Int8,
    /// These weights, and rows of activations made int8 before each product; needs a GPU.
    W8a8,
    /// The same with weights and rows rotated against outliers, as `--int8-activations` has them; needs a GPU.
    Rotated,
    /// Weights of linear layers in blocks as fp8 (e4m3) with a scale per row, and rows of activations made fp8 before each
    /// product where the GPU multiplies them; needs one.
    Fp8,
}

impl Form {
    /// Its name in files and tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Form::Bf16 => "bf16",
            Form::Int8 => "int8",
            Form::W8a8 => "w8a8",
            Form::Rotated => "rotated",
            Form::Fp8 => "fp8",
        }
    }
}

/// The way of a streamed block through host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Way {
    /// Page-locked as far as the device allows.
    Pinned,
    /// Nothing is page-locked: all passes through the staging ring.
    Ring,
}

/// One row to be measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) form: Form,
    pub(crate) way: Way,
    pub(crate) budget: Budget,
    /// Tokens of the picture; those of the text come on top.
    pub(crate) image: usize,
    /// Copies to the device are slowed down to so many bytes per second.
    pub(crate) link: Option<Bytes>,
    /// What is beside the weights.
    pub(crate) loras: Option<Loras>,
    pub(crate) steps: Steps,
}

/// How a row is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Steps {
    /// Steps after the first that are not timed.
    pub(crate) warm_up: usize,
    /// Each begins with a resident step and a step that brings copies into their steady state.
    pub(crate) groups: usize,
    /// Steps of a group that are timed, back to back.
    pub(crate) each: usize,
}

impl Steps {
    fn for_image(image: usize) -> Self {
        match image {
            // A step takes seconds.
            8192.. => Self { warm_up: 2, groups: 1, each: 3 },
            2048.. => Self { warm_up: 3, groups: 5, each: 1 },
            // Steps are short, and what else uses the link holds single ones up.
            _ => Self { warm_up: 3, groups: 7, each: 1 },
        }
    }
}

/// The tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Set {
    /// About a minute of [`Set::Table`].
    Quick,
    /// Every budget where the link binds, some where compute does, the ring beside them.
    Table,
    /// Every combination.
    All,
}

const GB: f64 = 1e9;
const BUDGETS: [f64; 7] = [1.2, 1.5, 2., 4., 8., 12., 16.];
const SLOW: f64 = 12.;
/// What the ring should keep up with.
const RING: f64 = 20.;

impl Set {
    /// Its rows, in the order in which they are measured; those of [`Form::W8a8`],
    /// [`Form::Rotated`] and [`Form::Fp8`] are not among them.
    pub(crate) fn requests(self) -> Vec<Request> {
        let mut all = Vec::new();
        let mut push = |form, way, budgets: &[f64], image, link: Option<f64>| {
            let link = link.map(|gb| Bytes((gb * GB) as u64));
            // Two dense blocks do not fit the smallest budget.
            let fits = |gb: &&f64| form != Form::Bf16 || **gb >= 1.5;
            all.extend(budgets.iter().filter(fits).map(|gb| Request {
                form,
                way,
                budget: match gb.is_finite() {
                    true => Budget::Bytes(Bytes((gb * GB) as u64)),
                    false => Budget::Unlimited,
                },
                image,
                link,
                loras: None,
                steps: Steps::for_image(image),
            }));
        };
        let resident = [&BUDGETS[..], &[f64::INFINITY]].concat();
        match self {
            Set::Quick => {
                push(Form::Bf16, Way::Pinned, &[1.5, 4., 12.], 1024, None);
                push(Form::Int8, Way::Pinned, &[1.2, 4.], 1024, None);
                push(Form::Bf16, Way::Ring, &[4.], 1024, None);
            }
            Set::Table => {
                for (form, medium, long) in
                    [(Form::Bf16, &[1.5, 4., 12.][..], 4.), (Form::Int8, &[1.2, 4.], 1.5)]
                {
                    push(form, Way::Pinned, &resident, 1024, None);
                    push(form, Way::Pinned, medium, 4096, None);
                    push(form, Way::Pinned, medium, 4096, Some(SLOW));
                    push(form, Way::Pinned, &[long], 16384, None);
                }
                push(Form::Bf16, Way::Pinned, &[2.], 1024, Some(RING));
                push(Form::Bf16, Way::Ring, &[2.], 1024, None);
                push(Form::Bf16, Way::Ring, &[2.], 1024, Some(RING));
            }
            Set::All => {
                for form in [Form::Bf16, Form::Int8] {
                    for image in [1024, 4096, 16384] {
                        push(form, Way::Pinned, &resident, image, None);
                        push(form, Way::Pinned, &resident, image, Some(SLOW));
                    }
                    push(form, Way::Pinned, &BUDGETS, 1024, Some(RING));
                    push(form, Way::Ring, &BUDGETS, 1024, None);
                    push(form, Way::Ring, &BUDGETS, 1024, Some(RING));
                }
            }
        }
        in_order(all)
    }
}

/// Every combination of what was asked for by hand.
pub(crate) fn combined(
    forms: &[Form],
    ways: &[Way],
    budgets: &[Budget],
    images: &[usize],
    links: &[Option<Bytes>],
) -> Vec<Request> {
    let mut all = Vec::new();
    for &form in forms {
        for &image in images {
            for &link in links {
                let steps = Steps::for_image(image);
                for &way in ways {
                    all.extend(budgets.iter().map(|&budget| Request {
                        form,
                        way,
                        budget,
                        image,
                        link,
                        loras: None,
                        steps,
                    }));
                }
            }
        }
    }
    in_order(all)
}

/// `rows`, and those of int8 weights with int8 activations and in fp8 too.
pub(crate) fn with_quantized_activations(mut rows: Vec<Request>) -> Vec<Request> {
    let int8: Vec<_> = rows.iter().filter(|row| row.form == Form::Int8).copied().collect();
    for form in [Form::W8a8, Form::Rotated, Form::Fp8] {
        rows.extend(int8.iter().map(|row| Request { form, ..*row }));
    }
    in_order(rows)
}

fn in_order(mut all: Vec<Request>) -> Vec<Request> {
    all.sort_by_key(|r| (r.way == Way::Ring, r.form, r.image));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_share_models_stand_together_and_sequences_grow() {
        for set in [Set::Quick, Set::Table, Set::All] {
            let rows = set.requests();
            let mut seen = Vec::new();
            for pair in rows.windows(2) {
                let key = |r: &Request| (r.form, r.way);
                if key(&pair[0]) == key(&pair[1]) {
                    assert!(pair[0].image <= pair[1].image, "{set:?}");
                } else {
                    assert!(!seen.contains(&key(&pair[1])), "{set:?}");
                    seen.push(key(&pair[0]));
                }
            }
            for (i, row) in rows.iter().enumerate() {
                assert!(!rows[..i].contains(row), "{row:?} twice in {set:?}");
                let timed = row.steps.groups * row.steps.each;
                assert!(timed >= if row.image > 4096 { 3 } else { 5 }, "{row:?}");
            }
        }
    }

    #[test]
    fn the_table_has_every_row_that_is_judged() {
        let table = Set::Table.requests();
        let gb = |gb: f64| Budget::Bytes(Bytes((gb * GB) as u64));
        let has = |form, way, budget, image, link: Option<u64>| {
            let link = link.map(|gb| Bytes(gb * 1_000_000_000));
            table.iter().any(|r| {
                (r.form, r.way, r.budget, r.image, r.link) == (form, way, budget, image, link)
            })
        };
        use Form::{Bf16, Int8};
        for budget in [1.5, 2., 4., 8., 12., 16.] {
            assert!(has(Bf16, Way::Pinned, gb(budget), 1024, None), "{budget}");
            assert!(has(Int8, Way::Pinned, gb(budget), 1024, None), "{budget}");
        }
        assert!(has(Int8, Way::Pinned, gb(1.2), 1024, None));
        assert!(!has(Bf16, Way::Pinned, gb(1.2), 1024, None));
        for form in [Bf16, Int8] {
            assert!(has(form, Way::Pinned, Budget::Unlimited, 1024, None));
        }
        for link in [None, Some(12)] {
            for budget in [1.5, 4., 12.] {
                assert!(has(Bf16, Way::Pinned, gb(budget), 4096, link));
            }
            for budget in [1.2, 4.] {
                assert!(has(Int8, Way::Pinned, gb(budget), 4096, link));
            }
        }
        assert!(has(Bf16, Way::Pinned, gb(4.), 16384, None));
        assert!(has(Int8, Way::Pinned, gb(1.5), 16384, None));
        for link in [None, Some(20)] {
            assert!(has(Bf16, Way::Pinned, gb(2.), 1024, link));
            assert!(has(Bf16, Way::Ring, gb(2.), 1024, link));
        }
        assert_eq!(table.len(), 7 + 8 + 2 * (3 + 2) + 2 + 3);
    }
}
