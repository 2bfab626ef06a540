//! Compares the model of each step with the host: the predicted state with what is observed after the step. Compiled in
//! only with the feature `failpoints`, so every test on a real host also tests the model.

#[cfg(feature = "failpoints")]
pub(super) use checked::{Prediction, ProxyPrediction};
#[cfg(not(feature = "failpoints"))]
pub(super) use unchecked::{Prediction, ProxyPrediction};

#[cfg(feature = "failpoints")]
mod checked {
    use std::collections::{BTreeMap, BTreeSet};

    use crate::{
        host::nginx::Published,
        model::{
            name::AppName,
            observed::{Instance, InstanceKey, ObservedApp},
            proxy::{ObservedProxy, Vhost},
            time::Timestamp,
        },
        plan::{
            simulate::{NewContainer, apply_step, contradiction, proxy_contradiction},
            step::Step,
        },
    };

    /// The prediction for the next observation of nginx: a generation, its vhosts, and the apps that were refused.
    #[derive(Debug, Default)]
    pub(crate) struct ProxyPrediction(Option<(u64, BTreeMap<AppName, Vhost>, BTreeSet<AppName>)>);

    impl ProxyPrediction {
        /// Predicts the live set after it was published.
        pub(crate) fn predict(&mut self, wanted: Option<&BTreeMap<AppName, Vhost>>, published: Option<&Published>) {
            self.0 = wanted.zip(published).map(|(wanted, published)| {
                (published.generation, wanted.clone(), published.rejected.keys().cloned().collect())
            });
        }

        /// Discards the prediction: the step failed somewhere.
        pub(crate) fn discard(&mut self) {
            self.0 = None;
        }

        /// Compares an observation with the prediction.
        pub(crate) fn compare(&mut self, seen: &ObservedProxy) {
            let Some((generation, wanted, rejected)) = self.0.take() else { return };
            if let Some(what) = proxy_contradiction(generation, &wanted, &rejected, seen) {
                tracing::error!("model and host differ: {what}");
            }
        }
    }

    /// The state at the last observation, and the predicted state after the steps since.
    #[derive(Debug)]
    struct Predicted {
        steps: Vec<Step>,
        before: ObservedApp,
        after: ObservedApp,
    }

    /// The prediction for the next observation.
    #[derive(Debug, Default)]
    pub(crate) struct Prediction {
        predicted: Option<Predicted>,
        /// Instances that this process created.
        created_here: BTreeSet<InstanceKey>,
    }

    impl Prediction {
        /// Predicts the state after a step that succeeded.
        pub(crate) fn predict(
            &mut self,
            step: &Step,
            created: Option<&NewContainer>,
            before: Option<&ObservedApp>,
            now: Timestamp,
        ) {
            // A 409 means an earlier agent's create call is still in flight under that name.
            if let Step::Create { key, .. } = step {
                self.created_here.insert(key.clone());
            }
            let Some(before) = before.cloned() else { return };
            let mut after = before.clone();
            apply_step(&mut after, step, created.cloned(), now);
            let (mut steps, before) = match self.predicted.take() {
                Some(earlier) => (earlier.steps, earlier.before),
                None => (Vec::new(), before),
            };
            steps.push(step.clone());
            self.predicted = Some(Predicted { steps, before, after });
        }

        /// Discards the prediction: something else may have happened since.
        pub(crate) fn discard(&mut self) {
            self.predicted = None;
        }

        /// Compares an observation with the prediction.
        pub(crate) fn compare(&mut self, seen: &ObservedApp) {
            let Some(Predicted { steps, before, after }) = self.predicted.take() else { return };
            let Some(last) = steps.last() else { return };
            match contradiction(last, &after, &self.without_unrelated(&before, seen)) {
                Some(what) => tracing::error!(step = %last, "model and host differ: {what}"),
                None => steps.iter().for_each(|step| tracing::debug!(step = %step, "model and host agree")),
            }
        }

        /// The observation without instances that an earlier agent created: Docker may finish a call at any time after
        /// its caller was killed.
        fn without_unrelated(&self, before: &ObservedApp, seen: &ObservedApp) -> ObservedApp {
            let is_unrelated =
                |i: &Instance| !self.created_here.contains(&i.key) && before.instances.iter().all(|b| b.key != i.key);
            let unrelated: BTreeSet<_> =
                seen.instances.iter().filter(|i| is_unrelated(i)).map(|i| i.key.clone()).collect();
            let mut seen = seen.clone();
            seen.instances.retain(|i| !unrelated.contains(&i.key));
            seen.socket_dirs.retain(|key| !unrelated.contains(key));
            seen
        }
    }
}

#[cfg(not(feature = "failpoints"))]
mod unchecked {
    use std::collections::BTreeMap;

    use crate::{
        host::nginx::Published,
        model::{
            name::AppName,
            observed::ObservedApp,
            proxy::{ObservedProxy, Vhost},
            time::Timestamp,
        },
        plan::{simulate::NewContainer, step::Step},
    };

    /// Empty without the feature.
    #[derive(Debug, Default)]
    pub(crate) struct ProxyPrediction(());

    impl ProxyPrediction {
        #[expect(clippy::unused_self, reason = "it has nothing to remember")]
        pub(crate) fn predict(&mut self, _wanted: Option<&BTreeMap<AppName, Vhost>>, _published: Option<&Published>) {}

        #[expect(clippy::unused_self, reason = "it has nothing to remember")]
        pub(crate) fn discard(&mut self) {}

        #[expect(clippy::unused_self, reason = "it has nothing to remember")]
        pub(crate) fn compare(&mut self, _seen: &ObservedProxy) {}
    }

    /// Empty without the feature.
    #[derive(Debug, Default)]
    pub(crate) struct Prediction(());

    impl Prediction {
        #[expect(clippy::unused_self, reason = "it has nothing to remember")]
        pub(crate) fn predict(
            &mut self,
            _step: &Step,
            _created: Option<&NewContainer>,
            _before: Option<&ObservedApp>,
            _now: Timestamp,
        ) {
        }

        #[expect(clippy::unused_self, reason = "it has nothing to remember")]
        pub(crate) fn discard(&mut self) {}

        #[expect(clippy::unused_self, reason = "it has nothing to remember")]
        pub(crate) fn compare(&mut self, _seen: &ObservedApp) {}
    }
}
