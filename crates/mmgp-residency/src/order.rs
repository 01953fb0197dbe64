//! The order of passes: learned in one run, expected in the next, checked at every pass.
//!
//! A run is what the caller says it is (one picture, say). A pass that does not come as expected
//! costs a block that was fetched in vain, never a result.

/// Expects the passes of a run in the order of the run before.
#[derive(Debug, Default)]
pub(crate) struct Order {
    log: Vec<usize>,
    expected: Vec<usize>,
    position: usize,
    /// Passes that came otherwise than expected.
    pub(crate) deviations: u64,
}

impl Order {
    /// A new run begins: what the last one did is expected now.
    pub(crate) fn begin(&mut self) {
        if !self.log.is_empty() {
            self.expected = std::mem::take(&mut self.log);
        }
        self.position = 0;
    }

    /// A pass of `model` begins.
    pub(crate) fn pass(&mut self, model: usize) {
        self.log.push(model);
        let rest = self.expected.get(self.position..).unwrap_or_default();
        match rest.iter().position(|&m| m == model) {
            Some(skipped) => {
                self.deviations += u64::from(skipped > 0);
                self.position += skipped + 1;
            }
            None if !self.expected.is_empty() => {
                self.deviations += 1;
                self.expected.clear();
            }
            None => {}
        }
    }

    /// The model of the pass after the one that runs now, if there is reason to believe in one.
    pub(crate) fn next(&self) -> Option<usize> {
        if let Some(&next) = self.expected.get(self.position) {
            return Some(next);
        }
        // In a first run: a model that ran twice in a row will run again.
        match (self.expected.is_empty(), self.log.as_slice()) {
            (true, [.., a, b]) if a == b => Some(*b),
            _ => None,
        }
    }

    /// How often a model runs, as far as seen: what it costs to give it back.
    pub(crate) fn passes(&self, model: usize) -> usize {
        let count = |list: &[usize]| list.iter().filter(|&&m| m == model).count();
        count(&self.expected).max(count(&self.log))
    }

    /// Forgets a model that was taken away.
    pub(crate) fn forget(&mut self, model: usize) {
        self.log.retain(|&m| m != model);
        self.expected.clear();
        self.position = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::Order;

    #[test]
    fn a_run_is_expected_again_and_skipped_models_cost_one_deviation() {
        let mut order = Order::default();
        order.begin();
        assert_eq!(order.next(), None);
        for model in [0, 1, 2, 2] {
            order.pass(model);
        }
        assert_eq!(order.next(), Some(2), "seen to repeat");
        order.pass(3);
        assert_eq!(order.next(), None);

        order.begin();
        assert_eq!(order.next(), Some(0));
        order.pass(2); // the encoders are not needed this time
        assert_eq!((order.next(), order.deviations), (Some(2), 1));
        order.pass(2);
        assert_eq!(order.next(), Some(3));
        order.pass(3);
        assert_eq!(order.passes(2), 2);

        order.begin();
        order.pass(2);
        assert_eq!((order.next(), order.deviations), (Some(2), 1), "the new order was learned");
        order.pass(9);
        assert_eq!((order.next(), order.deviations), (None, 2));
    }
}
