//! Freshness: whether what is held was made from inputs that are newer than the last cause.

/// Orders the causes, observations and plans of one thing (an app, or nginx) by one counter.
///
/// Each cause takes the next epoch: a hint, a change of the desired state, the end of a step, a standstill. An
/// observation has the epoch at which it began, a plan that at which it was made. Whether one may be used is a
/// comparison of two epochs.
#[derive(Debug, Default)]
pub(super) struct Freshness {
    epoch: u64,
    /// The last cause to observe.
    observe_due: u64,
    /// Observations that began before are stale.
    stale_before: u64,
    /// The last cause to plan.
    plan_due: u64,
    /// The last change of the desired state.
    desired_changed: u64,
    /// Plans from before are not applied to nginx.
    void_before: u64,
    /// When the last observation began, finished or not.
    began: Option<u64>,
    in_flight: bool,
    /// When the observation that is held began, and when it arrived.
    observed: Option<(u64, u64)>,
    /// Whether what is held was brought up to date since it was observed.
    amended: bool,
    /// When the last plan was made.
    planned: Option<u64>,
}

impl Freshness {
    fn next(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch
    }

    /// The epoch of the last cause to observe: unless it has changed, there was no other one.
    pub(super) fn observe_due(&self) -> u64 {
        self.observe_due
    }

    /// Something may have changed. What is held may still be used.
    pub(super) fn hint(&mut self) {
        self.observe_due = self.next();
    }

    /// Something changed: what is held, or being observed now, is stale.
    pub(super) fn invalidate(&mut self) {
        self.hint();
        self.stale_before = self.epoch;
    }

    /// The desired state changed: the plan is for another one as well.
    pub(super) fn change_desired(&mut self) {
        self.invalidate();
        self.desired_changed = self.epoch;
    }

    /// Time has passed unseen: what was planned is not applied either.
    pub(super) fn stand_still(&mut self) {
        self.invalidate();
        self.void_before = self.epoch;
    }

    /// Something that plans depend on changed, and observations do not.
    pub(super) fn request_plan(&mut self) {
        self.plan_due = self.next();
    }

    /// An observation begins.
    pub(super) fn begin(&mut self) {
        (self.began, self.in_flight) = (Some(self.epoch), true);
    }

    /// The observation succeeded. Returns true if nothing made it stale meanwhile.
    pub(super) fn succeed(&mut self) -> bool {
        (self.in_flight, self.amended) = (false, false);
        let arrived = self.next();
        self.observed = self.began.map(|began| (began, arrived));
        self.plan_due = arrived;
        self.is_valid()
    }

    /// What is held was brought up to date by the result of a step, or of a probe. An observation stays due.
    pub(super) fn amend(&mut self) {
        self.hint();
        let arrived = self.next();
        (self.observed, self.plan_due, self.amended) = (Some((arrived, arrived)), arrived, true);
    }

    /// The observation failed.
    pub(super) fn fail(&mut self) {
        (self.in_flight, self.observed) = (false, None);
        self.hint();
    }

    /// A plan was made. With `again`, the next one is made from the same observation.
    pub(super) fn plan(&mut self, again: bool) {
        let arrived = self.observed.map_or(0, |(_, arrived)| arrived);
        self.planned = Some(if again { arrived.saturating_sub(1) } else { self.epoch });
    }

    pub(super) fn is_observing(&self) -> bool {
        self.in_flight
    }

    pub(super) fn is_observe_due(&self) -> bool {
        self.began.is_none_or(|began| began < self.observe_due)
    }

    /// True if anything was observed, stale or not.
    pub(super) fn has_observed(&self) -> bool {
        self.observed.is_some()
    }

    /// True if the observation that is held is newer than everything that makes it stale.
    pub(super) fn is_valid(&self) -> bool {
        self.observed.is_some_and(|(began, _)| began >= self.stale_before)
    }

    /// True if what is held is in part what steps and probes say.
    pub(super) fn is_amended(&self) -> bool {
        self.amended
    }

    pub(super) fn is_plan_due(&self) -> bool {
        self.planned.is_none_or(|planned| planned < self.plan_due)
    }

    /// True if a plan is due and may be made from what is held. An observation is planned on before the next one begins:
    /// else a flood of hints would starve the app.
    pub(super) fn is_plannable(&self) -> bool {
        let is_unplanned = self.observed.is_some_and(|(_, arrived)| self.planned.is_none_or(|at| at < arrived));
        self.is_plan_due() && self.is_valid() && !self.in_flight && (is_unplanned || !self.is_observe_due())
    }

    /// True if the last plan was made from what is held, and nothing has happened since.
    pub(super) fn is_rested(&self) -> bool {
        self.is_valid() && !self.in_flight && !self.is_observe_due() && !self.is_plan_due() && self.is_plan_applicable()
    }

    /// True if the last plan is for the current desired state.
    pub(super) fn is_plan_current(&self) -> bool {
        self.planned.is_some_and(|planned| planned >= self.desired_changed)
    }

    /// True if the last plan may be applied to nginx.
    pub(super) fn is_plan_applicable(&self) -> bool {
        self.is_plan_current() && self.planned >= Some(self.void_before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a script of letters leads to: `h`int, `i`nvalidate, `d`esired changed, `s`tandstill, `p`lan requested, `b`egin,
    /// `o`bserved, `m` for amended, `f`ailed, `P`lanned, `A`gain on the same observation.
    fn after(script: &str) -> Freshness {
        let mut fresh = Freshness::default();
        for cause in script.chars() {
            match cause {
                'h' => fresh.hint(),
                'i' => fresh.invalidate(),
                'd' => fresh.change_desired(),
                's' => fresh.stand_still(),
                'p' => fresh.request_plan(),
                'b' => fresh.begin(),
                'o' => drop(fresh.succeed()),
                'm' => fresh.amend(),
                'f' => fresh.fail(),
                'P' => fresh.plan(false),
                'A' => fresh.plan(true),
                _ => unreachable!("no such cause"),
            }
        }
        fresh
    }

    #[test]
    fn every_answer_is_a_comparison_of_epochs() {
        // Observation due, valid, plannable, plan current, plan applicable.
        for (script, expected) in [
            ("", [true, false, false, false, false]),
            ("b", [false, false, false, false, false]),
            ("bo", [false, true, true, false, false]),
            ("boP", [false, true, false, true, true]),
            ("boPh", [true, true, false, true, true]),
            ("boh", [true, true, true, false, false]),
            ("bohbo", [false, true, true, false, false]),
            ("boPi", [true, false, false, true, true]),
            ("boPd", [true, false, false, false, false]),
            ("boPs", [true, false, false, true, false]),
            ("boPp", [false, true, true, true, true]),
            ("boPhp", [true, true, false, true, true]),
            ("boPbho", [true, true, true, true, true]),
            ("boPbio", [true, false, false, true, true]),
            ("boPbiobo", [false, true, true, true, true]),
            ("boPbdo", [true, false, false, false, false]),
            ("boPbdobo", [false, true, true, false, false]),
            ("boPbdoboP", [false, true, false, true, true]),
            ("boPbsobo", [false, true, true, true, false]),
            ("boPhbf", [true, false, false, true, true]),
            ("boPhbfbo", [false, true, true, true, true]),
            ("boA", [false, true, true, true, true]),
            ("boAh", [true, true, true, true, true]),
            ("boAP", [false, true, false, true, true]),
            ("boPim", [true, true, true, true, true]),
            ("boPimP", [true, true, false, true, true]),
            ("boPimi", [true, false, false, true, true]),
            ("boPimd", [true, false, false, false, false]),
            ("boPimPbo", [false, true, true, true, true]),
        ] {
            let fresh = after(script);
            let found = [
                fresh.is_observe_due(),
                fresh.is_valid(),
                fresh.is_plannable(),
                fresh.is_plan_current(),
                fresh.is_plan_applicable(),
            ];
            assert_eq!(found, expected, "{script}");
        }
    }

    #[test]
    fn what_was_amended_is_not_observed() {
        let amended = |script: &str| after(script).is_amended();
        assert!(amended("boPim") && amended("boPimPb") && amended("boPimPbf"));
        assert!(!amended("bo") && !amended("boPimPbo"));
    }
}
