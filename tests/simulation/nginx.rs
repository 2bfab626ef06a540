//! Simulated nginx: the set on disk, the set that its workers serve, and older sets that still finish requests.

use std::{collections::BTreeMap, time::Duration};

use demae::{
    host::nginx::{NginxError, Published},
    model::{
        name::AppName,
        proxy::{Manifest, ObservedProxy, Rejected, Vhost},
    },
};
use tokio::time::Instant;

use crate::{
    oracle::Before,
    scene::{Scene, is_leaving},
};

const TEMPLATES: &str = "templates of this host";

impl Scene {
    /// The set on disk first; then what needs the templates, which a publisher locks; the workers last.
    pub async fn proxy(&self) -> ObservedProxy {
        let (live, published, drifted) = {
            let mut state = self.state();
            state.proxy_observed_at = Instant::now();
            (state.proxy.live.clone(), state.proxy.published, state.proxy.drifted)
        };
        drop(self.templates.lock().await);
        let old_workers = self.old_workers();
        let proxy = &self.state().proxy;
        let serving = proxy.served.as_ref().filter(|_| proxy.runs).map(|m| m.generation);
        ObservedProxy {
            live,
            published,
            serving,
            error: serving.is_none().then(|| "connection refused".into()),
            unreadable: false,
            drifted,
            templates: TEMPLATES.into(),
            old_workers,
            workers_since: if proxy.runs { proxy.since } else { self.now() },
            changing: false,
        }
    }

    /// Waits while the agent is stalled.
    async fn wait_out_stall(&self) {
        let still = || self.state().stalled_until.filter(|until| *until > Instant::now());
        while let Some(until) = still() {
            tokio::time::sleep_until(until).await;
        }
    }

    /// Without a master the owner of a worker process is unknown.
    pub fn old_workers(&self) -> Option<usize> {
        let now = Instant::now();
        let proxy = &mut self.state().proxy;
        proxy.old.retain(|(_, until)| *until > now);
        proxy.runs.then_some(proxy.old.len())
    }

    pub async fn publish(&self, vhosts: &BTreeMap<AppName, Vhost>) -> Result<Published, NginxError> {
        self.note_snapshot();
        {
            let mut state = self.state();
            state.changing_since = Instant::now();
            state.observed_at_change = state.observed_at.clone();
        }
        let _templates = self.templates.lock().await;
        tokio::time::sleep(self.chance.millis(5, 60)).await;
        self.wait_out_stall().await;
        let now = self.now();
        let (generation, rejected) = {
            let mut state = self.state();
            // An app that an earlier set left out may still be served by its workers.
            let has_left = |app: &AppName| state.leaving.contains(app) && !vhosts.contains_key(app);
            let leaving = state.apps.keys().filter(|app| is_leaving(&state, app) || has_left(app)).cloned().collect();
            if state.disk_full {
                let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
                return Err(demae::host::files::FileError::cannot_write("/nginx".as_ref(), full).into());
            }
            if state.proxy.broken {
                return Err(NginxError::Broken("[emerg] unknown directive".into()));
            }
            let proxy = &mut state.proxy;
            let old = proxy.live.clone().unwrap_or_default();
            let mut new = Manifest { templates: TEMPLATES.into(), ..Manifest::default() };
            for (app, vhost) in vhosts {
                // A broken template: its last good part stays.
                if vhost.template.is_some() {
                    let error = "the template is broken".to_owned();
                    new.rejected.insert(app.clone(), Rejected { vhost: vhost.clone(), error, at: now });
                    if let Some(good) = old.vhosts.get(app) {
                        new.vhosts.insert(app.clone(), good.clone());
                    }
                } else {
                    new.vhosts.insert(app.clone(), vhost.clone());
                }
            }
            let rejected: BTreeMap<AppName, String> =
                new.rejected.iter().map(|(app, r)| (app.clone(), r.error.clone())).collect();
            if proxy.live.is_some() && new.vhosts == old.vhosts && !proxy.drifted {
                if let Some(live) = &mut proxy.live {
                    live.rejected = new.rejected;
                }
                return Ok(Published { generation: old.generation, reloaded: false, rejected });
            }
            new.generation = old.generation + 1;
            let served = proxy.runs && proxy.served.as_ref().is_some_and(|m| m.generation == old.generation);
            new.inherit(&old, served.then_some(proxy.since), now);
            let generation = new.generation;
            let live = new.clone();
            (proxy.live, proxy.published, proxy.drifted) = (Some(new), now, false);
            for app in vhosts.keys().filter(|app| old.vhosts.get(*app) != live.vhosts.get(*app)) {
                proxy.written.insert(app.clone(), Instant::now());
            }
            state.leaving = leaving;
            (generation, rejected)
        };
        self.record("nginx set", || format!("generation {generation}: {:?}", vhosts.keys().collect::<Vec<_>>()));
        // The agent may be killed here: the new set is on disk, and the old one is served.
        tokio::time::sleep(self.chance.millis(0, 5)).await;
        self.wait_out_stall().await;
        self.load().await?;
        Ok(Published { generation, reloaded: true, rejected })
    }

    pub async fn reload(&self) -> Result<(), NginxError> {
        tokio::time::sleep(self.chance.millis(1, 10)).await;
        self.wait_out_stall().await;
        if self.state().proxy.broken {
            return Err(NginxError::Broken("[emerg] unknown directive".into()));
        }
        self.load().await
    }

    async fn load(&self) -> Result<(), NginxError> {
        if !self.state().proxy.runs {
            return Err(NginxError::NotRunning("nginx does not run".into()));
        }
        let generation = self.state().proxy.live.as_ref().map_or(0, |m| m.generation);
        if self.state().proxy.ignores_reloads {
            tokio::time::sleep(Duration::from_secs(10)).await;
            let last = "it answers with the one before".to_owned();
            return Err(NginxError::NotProven { generation, last });
        }
        self.serve_live(true);
        tokio::time::sleep(self.chance.millis(1, 150)).await;
        Ok(())
    }

    /// Workers switch to the set on disk: by a reload, or at the start of nginx.
    pub fn serve_live(&self, by_agent: bool) {
        let finishing = self.chance.millis(50, 4_000);
        let now = self.now();
        {
            let mut state = self.state();
            let apps: Vec<AppName> = state.apps.keys().cloned().collect();
            let before: Vec<Before> = apps.iter().map(|app| Before::of(&state, app)).collect();
            let live = state.proxy.live.clone();
            state.proxy.since = now;
            let old = std::mem::replace(&mut state.proxy.served, live);
            if let Some(old) = old.filter(|_| by_agent) {
                state.proxy.old.push((old, Instant::now() + finishing));
            }
            for (app, before) in apps.iter().zip(&before) {
                self.routes_changed(&mut state, app);
                if let Some(wrong) = before.judge(&state, app, None).filter(|_| by_agent) {
                    state.violate(format!("a reload of nginx, for {app}: {wrong}"));
                }
            }
        }
        self.record("nginx serves", String::new);
    }
}
