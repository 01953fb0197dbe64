//! How long denoising steps take on the device, whose work is queued ahead of it.

use std::{collections::VecDeque, thread::sleep, time::Duration};

use mmgp_models::Event;
use mmgp_residency::{Clock, Device};

/// How often it is looked whether a step is over.
const POLL: Duration = Duration::from_micros(200);

/// Times each step on the device, and keeps whoever queues steps at most one ahead of it: what is told of a step is
/// news, and a run that is cancelled ends soon.
pub(crate) struct Pace<'a> {
    device: &'a dyn Device,
    /// Steps that are not known to be over, in order; of the last, the end may not be queued.
    steps: VecDeque<Step>,
}

struct Step {
    index: usize,
    of: usize,
    clock: Box<dyn Clock>,
}

impl<'a> Pace<'a> {
    pub(crate) fn new(device: &'a dyn Device) -> Self {
        Self { device, steps: VecDeque::new() }
    }

    /// Step `index` is queued from here on. Waits until the device is in the step before.
    pub(crate) fn begins(&mut self, index: usize, of: usize, tell: &mut dyn FnMut(Event)) {
        self.queued();
        self.drain(1, tell);
        match self.device.clock() {
            Ok(mut clock) => {
                clock.began();
                self.steps.push_back(Step { index, of, clock });
            }
            Err(error) => tracing::debug!("steps are not timed: {error}"),
        }
    }

    /// All steps are over.
    pub(crate) fn ends(&mut self, tell: &mut dyn FnMut(Event)) {
        self.queued();
        self.drain(0, tell);
    }

    fn queued(&mut self) {
        if let Some(last) = self.steps.back_mut() {
            last.clock.ended();
        }
    }

    /// Tells of the steps that are over; waits until no more than `ahead` are not.
    fn drain(&mut self, ahead: usize, tell: &mut dyn FnMut(Event)) {
        loop {
            let waits = self.steps.len() > ahead;
            let Some(Step { index, of, clock }) = self.steps.front_mut() else { return };
            match clock.read() {
                Ok(Some(times)) => {
                    tell(Event::Stepped { index: *index, of: *of, took: times.computed });
                    self.steps.pop_front();
                }
                Ok(None) if waits => sleep(POLL),
                Ok(None) => return,
                // Whatever is queued next will say so, too.
                Err(error) => {
                    tracing::debug!("step {index} was not timed: {error}");
                    self.steps.pop_front();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mmgp_residency::{Bytes, Occupancy, Result, Slot, VisitTimes};

    use super::*;

    /// A device that is seen to be over with a step only at a later look, or to have failed.
    struct Slow {
        looks: usize,
        fails: bool,
    }

    struct SlowClock {
        looks: usize,
        fails: bool,
        ended: bool,
    }

    impl Clock for SlowClock {
        fn asked(&mut self) {}
        fn began(&mut self) {}
        fn ended(&mut self) {
            self.ended = true;
        }
        fn read(&mut self) -> Result<Option<VisitTimes>> {
            assert!(self.ended, "it was not queued whole");
            self.looks -= 1;
            let times = VisitTimes { stalled: Duration::ZERO, computed: Duration::from_secs(7) };
            match self.looks {
                0 if self.fails => Err(mmgp_residency::Error::Cancelled),
                0 => Ok(Some(times)),
                _ => Ok(None),
            }
        }
    }

    impl Device for Slow {
        fn candle(&self) -> &candle_core::Device {
            &candle_core::Device::Cpu
        }
        fn compute_dtype(&self) -> candle_core::DType {
            candle_core::DType::F32
        }
        fn available(&self) -> Result<Bytes> {
            Ok(Bytes(0))
        }
        fn clock(&self) -> Result<Box<dyn Clock>> {
            Ok(Box::new(SlowClock { looks: self.looks, fails: self.fails, ended: false }))
        }
        fn slot(&self, _: Bytes, _: Occupancy) -> Result<Box<dyn Slot>> {
            unreachable!("no weights here")
        }
    }

    /// How many steps were told of when each of four began, and in the end.
    fn told(device: &Slow) -> (Vec<usize>, Vec<Event>) {
        let (mut pace, mut told, mut known) = (Pace::new(device), Vec::new(), Vec::new());
        for index in 0..4 {
            pace.begins(index, 4, &mut |event| told.push(event));
            known.push(told.len());
        }
        pace.ends(&mut |event| told.push(event));
        (known, told)
    }

    #[test]
    fn nobody_is_more_than_a_step_ahead_and_each_step_is_told_once() {
        let took = Duration::from_secs(7);
        let all: Vec<Event> = (0..4).map(|index| Event::Stepped { index, of: 4, took }).collect();
        let fails = false;
        assert_eq!(told(&Slow { looks: 1, fails }), (vec![0, 1, 2, 3], all.clone()));
        assert_eq!(told(&Slow { looks: 3, fails }), (vec![0, 0, 1, 2], all));
    }

    #[test]
    fn nobody_waits_for_a_device_that_failed() {
        assert_eq!(told(&Slow { looks: 3, fails: true }), (vec![0; 4], vec![]));
    }
}
