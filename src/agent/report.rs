//! What the loop tells after each round: status, metrics, readiness. Told only when it changed.

use super::{Agent, app::AppState};
use crate::{
    metrics::Metrics,
    model::{
        desired::HostMode,
        status::{HostStatus, State, VERSION},
        time::Timestamp,
    },
    plan::wait::{Block, Wait},
};

impl Agent {
    /// Brings status, metrics and readiness up to date.
    pub(super) fn tell(&mut self) {
        let now = Timestamp::now();
        let host = self.world.host.clone();
        let store = self.updates.borrow().status.clone();
        let mut apps = Vec::new();
        for (app, state) in &mut self.apps {
            match state.status(app, &host, now) {
                Some(status) => apps.push(status),
                // Neither here nor wanted here: its series would stand still for ever.
                None if state.take_untold() => self.outlets.metrics.forget(app),
                None => {}
            }
        }
        let (blocks, waits) = (&self.outlets.metrics.blocks, &self.outlets.metrics.waits);
        let plans = || self.apps.values().filter_map(|s| s.plan_made());
        Metrics::set_kinds(blocks, &mut self.known_blocks, plans().flat_map(|p| &p.blocks).map(Block::kind));
        Metrics::set_kinds(waits, &mut self.known_waits, plans().flat_map(|p| &p.waits).map(Wait::kind));
        for app in &apps {
            let metrics = &self.outlets.metrics;
            let name = &[app.app.as_str()];
            metrics.wanted.with_label_values(name).set(i64::from(app.wanted));
            metrics.healthy.with_label_values(name).set(i64::from(app.healthy));
            metrics.converged.with_label_values(name).set(i64::from(app.state == State::Converged));
        }
        self.tell_store();
        let snapshot = self.snapshot.as_ref();
        let proxy = self.proxy.trouble.clone().or_else(|| {
            let error = if self.proxy.seen { self.proxy.observed.error.clone() } else { None };
            error.or_else(|| self.docker_error.clone())
        });
        let status = HostStatus {
            version: VERSION,
            host,
            mode: snapshot.map_or(HostMode::Active, |s| s.mode),
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            store,
            proxy,
            apps,
            unreadable: snapshot.map(|s| s.unreadable.clone()).unwrap_or_default(),
        };
        let labels = snapshot.map(|s| s.labels.clone()).unwrap_or_default();
        self.outlets.publish.send_if_modified(|(known, known_labels)| {
            // The time of the last proof changes all the time and is nobody's news.
            let same = known.apps == status.apps && known.mode == status.mode && *known_labels == labels;
            if !same {
                *known = status.clone();
                *known_labels = labels;
            }
            !same
        });
        self.outlets.status.send_replace(status);
        let ready =
            self.snapshot.is_some() && self.listed && self.proxy.seen && self.apps.values().all(AppState::is_looked_at);
        let first = self.outlets.ready.send_if_modified(|known| std::mem::replace(known, ready) != ready);
        if first && ready {
            tracing::info!(apps = self.apps.len(), "ready: etcd, Docker and nginx have been read");
            // Outside of systemd nobody listens.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        }
    }

    fn tell_store(&self) {
        let metrics = &self.outlets.metrics;
        let update = self.updates.borrow();
        metrics.revision.set(update.status.revision);
        metrics.store_reads.set(i64::try_from(update.reads).unwrap_or(i64::MAX));
        for (kind, count) in &update.errors {
            metrics.store_errors.with_label_values(&[kind]).set(i64::try_from(*count).unwrap_or(i64::MAX));
        }
    }
}
