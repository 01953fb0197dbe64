//! What a person sees while a pipeline runs.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mmgp::Event;

/// A bar per run, with seconds per step; where there is no terminal to draw it on, a line per step.
pub(crate) struct Progress {
    bar: ProgressBar,
    lines: bool,
    step: Option<Instant>,
    last: Duration,
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
        Self {
            bar,
            lines,
            step: None,
            last: Duration::ZERO,
            steps: Vec::new(),
            begun: Instant::now(),
        }
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
                if let Some(begun) = self.step.replace(Instant::now()) {
                    self.stepped(begun.elapsed());
                    self.line(*index, *of);
                } else if let Ok(style) =
                    ProgressStyle::with_template("{bar:30} step {pos}/{len}  {msg}  {elapsed_precise}")
                {
                    self.bar.set_style(style);
                    self.bar.set_length(*of as u64);
                }
                self.bar.set_position(*index as u64);
                if *index > 0 {
                    self.bar.set_message(format!("{:.2} s/step", self.last.as_secs_f64()));
                }
            }
            Event::Decoding => {
                self.begun = Instant::now();
                if let Some(begun) = self.step.take() {
                    self.stepped(begun.elapsed());
                    let steps = self.bar.length().unwrap_or(0) as usize;
                    self.line(steps, steps);
                }
                self.bar.set_position(self.bar.length().unwrap_or(0));
                let last = self.last.as_secs_f64();
                self.bar.set_message(format!("{last:.2} s/step, decoding"));
            }
            _ => {}
        }
    }

    fn stepped(&mut self, took: Duration) {
        self.last = took;
        self.steps.push(took);
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

    /// So many steps are done.
    fn line(&self, done: usize, of: usize) {
        if self.lines {
            eprintln!("step {done} of {of}: {:.2} s", self.last.as_secs_f64());
        }
    }
}
