//! Holds the model of a host to the host: what a step is said to leave behind, against what is seen after it. Compiled in
//! only with the feature `failpoints`, so that every test on a real host is a test of the model too.

#[cfg(feature = "failpoints")]
pub(super) use checked::Prediction;
#[cfg(not(feature = "failpoints"))]
pub(super) use unchecked::Prediction;

#[cfg(feature = "failpoints")]
mod checked {
    use std::collections::BTreeSet;

    use crate::{
        model::{
            name::ContainerId,
            observed::{Instance, InstanceKey, ObservedApp},
            time::Timestamp,
        },
        plan::{
            simulate::{self, address, contradiction, leave_behind},
            step::Step,
        },
    };

    /// What was seen before a step, and what the model says of after it.
    #[derive(Debug)]
    struct Made {
        step: Step,
        before: ObservedApp,
        after: ObservedApp,
    }

    /// What is about to be seen.
    #[derive(Debug, Default)]
    pub(crate) struct Prediction {
        made: Option<Made>,
        /// Which instances Docker has made for this process.
        asked: BTreeSet<InstanceKey>,
    }

    impl Prediction {
        /// A step succeeded, on what was seen before it.
        pub(crate) fn make(&mut self, step: &Step, before: Option<&ObservedApp>, now: Timestamp) {
            // One that was refused is still the call of the agent before, which had the name.
            if let Step::Create { key, .. } = step {
                self.asked.insert(key.clone());
            }
            let Some(before) = before.cloned() else { return };
            let mut after = before.clone();
            let made = match step {
                Step::Create { key, release, .. } => ContainerId::try_from("0".repeat(64))
                    .ok()
                    .map(|id| simulate::Made { id, address: address(key, release, 0) }),
                _ => None,
            };
            leave_behind(&mut after, step, made, now);
            self.made = Some(Made { step: step.clone(), before, after });
        }

        /// Something else may have happened since.
        pub(crate) fn drop(&mut self) {
            self.made = None;
        }

        /// This was seen.
        pub(crate) fn compare(&mut self, seen: &ObservedApp) {
            let Some(Made { step, before, after }) = self.made.take() else { return };
            match contradiction(&step, &after, &self.without_late(&before, seen)) {
                Some(what) => tracing::error!(step = %step, "model and host differ: {what}"),
                None => tracing::debug!(step = %step, "model and host agree"),
            }
        }

        /// What was seen, without the instances that came up meanwhile and that this process did not ask for: Docker ends a
        /// call whose caller was killed, at any moment.
        fn without_late(&self, before: &ObservedApp, seen: &ObservedApp) -> ObservedApp {
            let is_late =
                |i: &Instance| !self.asked.contains(&i.key) && before.instances.iter().all(|b| b.key != i.key);
            let late: BTreeSet<_> = seen.instances.iter().filter(|i| is_late(i)).map(|i| i.key.clone()).collect();
            let mut seen = seen.clone();
            seen.instances.retain(|i| !late.contains(&i.key));
            seen.socket_dirs.retain(|key| !late.contains(key));
            seen
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
