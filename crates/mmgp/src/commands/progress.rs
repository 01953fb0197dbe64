//! What a person sees while a pipeline runs.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mmgp::Event;

/// A bar per run, with seconds per step; where there is no terminal to draw it on, a line per step.
pub(crate) struct Progress {
    bar: ProgressBar,
    lines: bool,
    /// What each took.
    steps: Vec<Duration>,
    /// When decoding began.
    begun: Instant,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Self {
        let target =
            if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(None, target);
        let lines = !quiet && bar.is_hidden();
        Self { bar, lines, steps: Vec::new(), begun: Instant::now() }
    }

    pub(crate) fn tell(&mut self, event: &Event) {
        match event {
            Event::Encoding => self.bar.set_message("encoding the prompt"),
            Event::Cut { encoder, limit, text } => self.bar.suspend(|| {
                eprintln!(
                    "warning: the prompt is longer than the {limit} tokens that {encoder} sees; cut: {text:?}"
                );
            }),
            Event::Step { index, of } => {
                if *index == 0
                    && let Ok(style) = ProgressStyle::with_template(
                        "{bar:30} step {pos}/{len}  {msg}  {elapsed_precise}",
                    )
                {
                    self.bar.set_style(style);
                    self.bar.set_length(*of as u64);
                    self.bar.set_message("");
                }
                self.bar.set_position(*index as u64);
            }
            Event::Stepped { index, of, took } => {
                self.steps.push(*took);
                let (done, took) = (index + 1, took.as_secs_f64());
                self.bar.set_position(self.bar.position().max(done as u64));
                self.bar.set_message(format!("{took:.2} s/step"));
                if self.lines {
                    eprintln!("step {done} of {of}: {took:.2} s");
                }
            }
            Event::Decoding => {
                self.begun = Instant::now();
                self.bar.set_message(match self.steps.last() {
                    Some(took) => format!("{:.2} s/step, decoding", took.as_secs_f64()),
                    None => "decoding".into(),
                });
            }
            _ => {}
        }
    }

    /// What a step took in the median of all but the first, which measures.
    pub(crate) fn step(&self) -> Option<Duration> {
        let mut steps = self.steps.get(1..)?.to_vec();
        steps.sort_unstable();
        steps.get(steps.len() / 2).copied()
    }

    /// So many frames are decoded.
    pub(crate) fn frame(&self, done: usize) {
        self.bar.set_message(format!("frame {done}"));
    }

    /// All frames are decoded.
    pub(crate) fn decoded(&self, frames: usize) {
        if self.lines && frames > 1 {
            eprintln!("{frames} frames: {:.2} s", self.begun.elapsed().as_secs_f64());
        }
        self.bar.finish_and_clear();
    }
}
