//! The hand-offs between the thread that computes, the workers and the ring, under shuttle's schedulers.
//!
//! The pager and the ring are the real ones; the device is memory that checks its contract. Each scenario
//! runs under many schedules, and whatever it leaves to chance is drawn anew in each. A failure prints its
//! schedule, which `shuttle::replay` runs again.

use shuttle::{
    Config, Runner,
    rand::Rng,
    scheduler::{PctScheduler, RandomScheduler},
};

mod memory;
mod paging;
mod ring;

/// Schedules of each scenario that switch threads at random, ...
const RANDOM: usize = 2000;
/// ... and that keep to priorities but for a few switches: they find what needs few, but unlikely, ones.
const BY_PRIORITY: usize = 1000;
const SWITCHES: usize = 3;

/// Runs `scenario` under many schedules.
fn explore(scenario: fn()) {
    let mut config = Config::new();
    config.stack_size = 1 << 18; // candle's operations take more than shuttle expects
    config.silence_warnings = true; // of atomics, which are sequentially consistent here
    config.ungraceful_shutdown_config.immediately_return_on_panic = true;
    Runner::new(RandomScheduler::new(RANDOM), config.clone()).run(scenario);
    Runner::new(PctScheduler::new(SWITCHES, BY_PRIORITY), config).run(scenario);
}

/// One of `choices`, by the schedule.
fn any<T: Copy>(choices: &[T]) -> T {
    choices[shuttle::rand::thread_rng().gen_range(0..choices.len())]
}
