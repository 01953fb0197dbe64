//! Schedulers: which noise levels a run visits, and the step from one to the next.
//!
//! A scheduler is made from its config and answers a request with a schedule, which holds no state:
//! several runs may step through one schedule at a time.

pub mod ddim;
pub mod discrete;
pub mod dpm;
pub mod flow_match_euler;
