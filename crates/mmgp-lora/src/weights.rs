//! How strongly an adapter acts, over the denoising steps and their phases.
//!
//! As text: `0.5`; `0.5,0.8,1`, weights that share the steps; `1,0.5;0`, phases with weights each. Of
//! `n` weights over `m` steps, step `i` takes number `⌊i·n/m⌋`, and phases share the steps in the same
//! way unless the caller gives their first steps.

use std::{fmt, str::FromStr};

use crate::{Error, Result};

/// The weights of one adapter: phases, none of them empty, of finite numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct StepWeights(Vec<Vec<f32>>);

impl StepWeights {
    /// One weight at every step.
    ///
    /// # Errors
    /// NaN and infinities.
    pub fn constant(weight: f32) -> Result<Self> {
        weight.to_string().parse()
    }

    /// The weight at `step`, counted from 0; what lies behind the last step gets the last weight.
    ///
    /// Where the caller gave first steps of phases, phases of the text that are more than those are
    /// never reached, and the last of fewer goes on to the end.
    pub fn at(&self, step: usize, steps: &Steps) -> f32 {
        let Self(phases) = self;
        let count = steps.count.max(1);
        let step = step.min(count - 1);
        let first = |phase: usize| match (phase, &steps.firsts) {
            (0, _) => 0,
            (_, Some(firsts)) => firsts.get(phase - 1).copied().unwrap_or(count),
            (_, None) => scale(phase, count, phases.len(), u128::div_ceil),
        };
        let phase = (0..phases.len()).rev().find(|&phase| first(phase) <= step).unwrap_or(0);
        let until = if phase + 1 < phases.len() { first(phase + 1) } else { count };
        let (from, weights) = (first(phase), &phases[phase]);
        weights[scale(step - from, weights.len(), until - from, |a, b| a / b)]
    }

    /// Whether it is the same number at every step.
    pub fn is_constant(&self) -> bool {
        self.0.iter().flatten().all(|w| *w == self.0[0][0])
    }
}

/// `a·b/c`, rounded as `divide` does, without overflow.
fn scale(a: usize, b: usize, c: usize, divide: fn(u128, u128) -> u128) -> usize {
    divide(a as u128 * b as u128, c as u128) as usize
}

impl Default for StepWeights {
    /// 1 at every step.
    fn default() -> Self {
        Self(vec![vec![1.]])
    }
}

impl FromStr for StepWeights {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |reason: String| Error::WeightSyntax { text: text.into(), reason };
        let mut phases = Vec::new();
        for (at, phase) in text.split(';').enumerate() {
            let mut weights = Vec::new();
            for (i, number) in phase.split(',').enumerate() {
                match number.trim().parse::<f32>() {
                    Ok(weight) if weight.is_finite() => weights.push(weight),
                    _ => {
                        let found = match number.trim() {
                            "" => "is empty".to_string(),
                            found => format!("`{}` is no number", crate::error::Quoted(found)),
                        };
                        return Err(wrong(match text.contains(';') {
                            true => format!("weight {} of phase {} {found}", i + 1, at + 1),
                            false => format!("weight {} {found}", i + 1),
                        }));
                    }
                }
            }
            phases.push(weights);
        }
        Ok(Self(phases))
    }
}

impl fmt::Display for StepWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, phase) in self.0.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { ";" })?;
            for (i, weight) in phase.iter().enumerate() {
                write!(f, "{}{weight}", if i == 0 { "" } else { "," })?;
            }
        }
        Ok(())
    }
}

/// The denoising steps of a run, and where its phases begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps {
    count: usize,
    firsts: Option<Vec<usize>>,
}

impl Steps {
    /// `count` steps that phases share equally.
    pub fn new(count: usize) -> Self {
        Self { count, firsts: None }
    }

    /// `count` steps; `firsts` are the first steps of the second phase and of those behind it.
    ///
    /// # Errors
    /// Numbers that do not ascend or are no steps behind the first.
    pub fn with_phases(count: usize, firsts: &[usize]) -> Result<Self> {
        let ascending = firsts.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || firsts.iter().any(|&first| first == 0 || first >= count) {
            return Err(Error::Phases { firsts: firsts.to_vec(), count });
        }
        Ok(Self { count, firsts: Some(firsts.to_vec()) })
    }

    /// The number of steps.
    pub fn count(&self) -> usize {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(text: &str, steps: &Steps) -> Vec<f32> {
        let weights: StepWeights = text.parse().unwrap();
        (0..steps.count()).map(|step| weights.at(step, steps)).collect()
    }

    #[test]
    fn weights_share_the_steps() {
        assert_eq!(all("0.5", &Steps::new(3)), [0.5; 3]);
        assert_eq!(all("1,2,3", &Steps::new(7)), [1., 1., 1., 2., 2., 3., 3.]);
        assert_eq!(all("1,2,3", &Steps::new(2)), [1., 2.]);
        assert_eq!(all("1,2;3", &Steps::new(8)), [1., 1., 2., 2., 3., 3., 3., 3.]);
        assert_eq!(all("1;2;3", &Steps::new(2)), [1., 2.]);
    }

    #[test]
    fn phases_begin_where_the_caller_says() {
        let steps = Steps::with_phases(6, &[1, 4]).unwrap();
        assert_eq!(all("1;2,3;4", &steps), [1., 2., 2., 3., 4., 4.]);
        assert_eq!(all("1;2", &steps), [1., 2., 2., 2., 2., 2.]);
        assert_eq!(all("1,2", &steps), [1., 1., 1., 2., 2., 2.]);
        assert_eq!(all("1;2;3;9", &steps), [1., 2., 2., 2., 3., 3.]);
        for firsts in [&[0, 2][..], &[2, 2], &[3, 1], &[6]] {
            assert!(Steps::with_phases(6, firsts).is_err(), "{firsts:?}");
        }
        assert!(Steps::with_phases(0, &[]).is_ok());
    }

    #[test]
    fn what_is_no_weight_is_named() {
        for (text, part) in [
            ("", "weight 1 is empty"),
            ("1,,2", "weight 2 is empty"),
            ("1,x", "`x` is no number"),
            ("1;2,nan", "weight 2 of phase 2 `nan`"),
            ("1e39", "`1e39`"),
            ("inf", "`inf`"),
            ("1;", "weight 1 of phase 2 is empty"),
        ] {
            let error = text.parse::<StepWeights>().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert!(StepWeights::constant(f32::NAN).is_err());
        assert_eq!(StepWeights::constant(-1.5).unwrap().to_string(), "-1.5");
    }

    proptest! {
        #[test]
        fn step_i_takes_number_i_n_over_m(
            weights in prop::collection::vec(-9f32..9., 1..9),
            count in 1usize..60,
        ) {
            let text: Vec<String> = weights.iter().map(f32::to_string).collect();
            let got = all(&text.join(","), &Steps::new(count));
            for (i, got) in got.iter().enumerate() {
                prop_assert_eq!(*got, weights[i * weights.len() / count]);
            }
            // Phases of one weight each are weights.
            prop_assert_eq!(got, all(&text.join(";"), &Steps::new(count)));
        }

        #[test]
        fn any_text_reads_back_or_fails_and_any_step_has_a_weight(
            text in "[0-9.,;-]{0,12}",
            step: usize,
            count: usize,
            firsts in prop::collection::vec(0usize..9, 0..4),
        ) {
            if let Ok(weights) = text.parse::<StepWeights>() {
                prop_assert_eq!(&weights.to_string().parse::<StepWeights>().unwrap(), &weights);
                prop_assert!(weights.at(step, &Steps::new(count)).is_finite());
                if let Ok(steps) = Steps::with_phases(count % 12, &firsts) {
                    prop_assert!(weights.at(step % 12, &steps).is_finite());
                }
            }
        }
    }
}
