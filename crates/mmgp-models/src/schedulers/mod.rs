//! Schedulers: which noise levels a run visits, and the step from one to the next.

pub mod flow_match_euler;
