//! Publishes status, metrics and readiness after each round, if they changed.

use std::{collections::BTreeSet, sync::Arc};

use super::{Agent, app::AppState};
use crate::{
    machine::Machine,
    metrics::{AppView, StoreView, View},
    model::{
        desired::HostMode,
        event::What,
        status::{HostStatus, StoreBlock, StoreStatus, VERSION},
    },
};

impl<M: Machine> Agent<M> {
    /// Updates status, metrics and readiness.
    pub(super) fn report(&mut self) {
        let host = self.machine.host().clone();
        let store = self.updates.borrow().status.clone();
        // An app that is neither here nor wanted here has no status.
        let (mut apps, mut views) = (Vec::new(), Vec::new());
        for state in self.apps.values_mut() {
            if let Some(status) = state.status(self.machine.as_ref()) {
                views.push(state.view(&status, self.machine.as_ref()));
                apps.push(status);
            }
        }
        self.report_metrics(views);
        self.report_store(&store);
        let snapshot = self.snapshot.as_ref();
        let proxy = self
            .proxy
            .trouble
            .clone()
            .or_else(|| if self.proxy.fresh.has_observed() { self.proxy.observed.error.clone() } else { None });
        // An error of Docker comes first: nothing goes on without it.
        let notes: Vec<String> = self.docker_error.iter().cloned().chain(proxy).chain(self.foreign_note()).collect();
        let proxy = (!notes.is_empty()).then(|| notes.join("; "));
        let status = HostStatus {
            version: VERSION,
            host,
            mode: snapshot.map_or(HostMode::Active, |s| s.mode),
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            store,
            proxy,
            tcp_routes: self.machine.tcp_routes_trouble(),
            apps,
            unreadable: snapshot.map(|s| s.unreadable.clone()).unwrap_or_default(),
        };
        let labels = snapshot.map(|s| s.labels.clone()).unwrap_or_default();
        self.outlets.publish.send_if_modified(|(known, known_labels)| {
            // The time of the last sync changes constantly and is not worth a write to the store.
            let same = known.apps == status.apps && known.mode == status.mode && *known_labels == labels;
            if !same {
                *known = status.clone();
                *known_labels = labels;
            }
            !same
        });
        self.outlets.status.send_replace(status);
        let ready = self.snapshot.is_some()
            && self.listed
            && self.proxy.fresh.has_observed()
            && self.apps.values().all(AppState::was_observe_attempted);
        let first = self.outlets.ready.send_if_modified(|known| std::mem::replace(known, ready) != ready);
        if first && ready {
            tracing::info!(apps = self.apps.len(), "ready: etcd, Docker and nginx have been read");
            // Fails outside of systemd.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        }
    }

    /// The note about containers with this host's name that another agent created.
    fn foreign_note(&self) -> Option<String> {
        let first = self.foreign.first()?;
        let more = if self.foreign.len() > 1 { format!(" and {} more", self.foreign.len() - 1) } else { String::new() };
        Some(format!(
            "container `{}`{more} of this host's name belong to another agent and are left alone: {}; stop one of the two agents, or give it another name (`host` in its file); to take its containers over, `demae adopt ID`",
            first.name, first.owner
        ))
    }

    fn report_metrics(&mut self, apps: Vec<AppView>) {
        let update = self.updates.borrow();
        let store = StoreView {
            synced: update.status.synced,
            proven: update.proven,
            revision: update.status.revision,
            lag: update.head.saturating_sub(update.read_to).max(0),
            block: update.status.block.as_ref().map(|b| b.kind.clone()),
            reads: update.reads,
            resyncs: update.resyncs,
            errors: update.errors.clone(),
            unpublished: self.outlets.publishing.failing_for(),
        };
        drop(update);
        let mode = self.snapshot.as_ref().map_or(HostMode::Active, |s| s.mode);
        let unreadable = self.snapshot.as_ref().map_or(0, |s| s.unreadable.len());
        let draining_workers = self.proxy.observed.old_workers.unwrap_or(0);
        // Replaced as a whole, so a scrape in progress keeps the old view.
        self.outlets.view.send_modify(|view| {
            let (host, prefix) = (view.host.clone(), view.prefix.clone());
            *view = Arc::new(View { host, prefix, mode, store, unreadable, draining_workers, apps });
        });
        let used: BTreeSet<u16> = self.apps.values().flat_map(AppState::ports).collect();
        let ports = self.machine.ports(&used);
        let tcp_routes = self.machine.has_tcp_routes();
        let policy_unusable = self.policy.why_unusable().is_some();
        self.outlets.host_gauges.send_if_modified(|v| {
            let before = (v.ports, v.tcp_routes, v.policy_unusable);
            (v.ports, v.tcp_routes, v.policy_unusable) = (ports, tcp_routes, policy_unusable);
            before != (ports, tcp_routes, policy_unusable)
        });
    }

    /// Emits events when the store becomes unreachable or quarantined, and when that is resolved.
    fn report_store(&mut self, store: &StoreStatus) {
        let events = &self.outlets.events;
        let kind = |block: &Option<StoreBlock>| block.as_ref().map(|b| b.kind.clone());
        if kind(&self.store_block) != kind(&store.block) {
            if let Some(kind) = kind(&self.store_block) {
                events.emit(None, What::Unblock { kind: kind.clone() }, format!("resolved: {kind}"));
            }
            if let Some(block) = &store.block {
                let what = What::Block { kind: block.kind.clone(), remedy: block.remedy.clone() };
                events.emit(None, what, format!("the store is not trusted: {}", block.message));
            }
            self.store_block = store.block.clone();
        }
        let error = store.error.as_deref();
        let reachable = error.is_none();
        if std::mem::replace(&mut self.store_reachable, reachable) != reachable {
            let message = match error {
                Some(error) => format!("the store cannot be read: {error}"),
                None => "the store can be read again".to_owned(),
            };
            self.outlets.events.emit(None, What::Store { reachable }, message);
        }
    }
}
