//! Holds the model of a host to the host: what a step is said to leave behind, against what is seen after it. Compiled in
//! only with the feature `failpoints`, so that every test on a real host is a test of the model too.

#[cfg(feature = "failpoints")]
pub(super) use checked::Prediction;
#[cfg(not(feature = "failpoints"))]
pub(super) use unchecked::Prediction;

#[cfg(feature = "failpoints")]
mod checked {
    use std::{
        sync::OnceLock,
        time::{Duration, Instant},
    };

    use crate::{
        model::{name::ContainerId, observed::ObservedApp, time::Timestamp},
        plan::{
            simulate::{Made, address, contradiction, leave_behind},
            step::Step,
        },
    };

    /// How long after its start an agent may still see what the one before asked Docker for when it was killed.
    const LATE: Duration = Duration::from_secs(3);
    /// When this process made its first prediction; that is soon after its start.
    static BEGAN: OnceLock<Instant> = OnceLock::new();

    /// What is about to be seen.
    #[derive(Debug, Default)]
    pub(crate) struct Prediction(Option<(Step, ObservedApp)>);

    impl Prediction {
        /// A step succeeded, on what was seen before it.
        pub(crate) fn make(&mut self, step: &Step, before: Option<&ObservedApp>, now: Timestamp) {
            BEGAN.get_or_init(Instant::now);
            let Some(mut after) = before.cloned() else { return };
            let made = match step {
                Step::Create { key, release, .. } => {
                    ContainerId::try_from("0".repeat(64)).ok().map(|id| Made { id, address: address(key, release, 0) })
                }
                _ => None,
            };
            leave_behind(&mut after, step, made, now);
            self.0 = Some((step.clone(), after));
        }

        /// Something else may have happened since.
        pub(crate) fn drop(&mut self) {
            self.0 = None;
        }

        /// This was seen.
        pub(crate) fn compare(&mut self, seen: &ObservedApp) {
            let Some((step, predicted)) = self.0.take() else { return };
            let is_young = BEGAN.get().is_some_and(|began| began.elapsed() < LATE);
            match contradiction(&step, &predicted, seen) {
                Some(what) if is_young => tracing::info!(step = %step, "model and host may differ for a while: {what}"),
                Some(what) => tracing::error!(step = %step, "model and host differ: {what}"),
                None => tracing::debug!(step = %step, "model and host agree"),
            }
        }
    }
}

#[cfg(not(feature = "failpoints"))]
mod unchecked {
    use crate::{
        model::{observed::ObservedApp, time::Timestamp},
        plan::step::Step,
    };

    /// Nothing, without the feature.
    #[derive(Debug, Default)]
    pub(crate) struct Prediction(());

    impl Prediction {
        #[expect(clippy::unused_self, reason = "it has nothing to remember")]
        pub(crate) fn make(&mut self, _step: &Step, _before: Option<&ObservedApp>, _now: Timestamp) {}

        #[expect(clippy::unused_self, reason = "it has nothing to remember")]
        pub(crate) fn drop(&mut self) {}

        #[expect(clippy::unused_self, reason = "it has nothing to remember")]
        pub(crate) fn compare(&mut self, _seen: &ObservedApp) {}
    }
}
