//! nginx, played: a set on disk, the set that its workers answer with, and the older ones that still finish requests.

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
    scene::{Scene, leaves},
};

const TEMPLATES: &str = "templates of this host";

impl Scene {
    /// What is on disk first; then what needs the templates, which whoever publishes has to itself; the workers last.
    pub async fn proxy(&self) -> ObservedProxy {
        let (live, published, drifted) = {
            let mut state = self.state();
            state.looked_at_proxy = Instant::now();
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

    /// Nothing of the agent goes on while it gets no time.
    async fn given_time(&self) {
        let still = || self.state().still_until.filter(|until| *until > Instant::now());
        while let Some(until) = still() {
            tokio::time::sleep_until(until).await;
        }
    }

    /// Without a master nobody knows whose worker a process is.
    pub fn old_workers(&self) -> Option<usize> {
        let now = Instant::now();
        let proxy = &mut self.state().proxy;
        proxy.old.retain(|(_, until)| *until > now);
        proxy.runs.then_some(proxy.old.len())
    }

    pub async fn publish(&self, vhosts: &BTreeMap<AppName, Vhost>) -> Result<Published, NginxError> {
        self.note_belief();
        self.state().changing_since = Instant::now();
        let _templates = self.templates.lock().await;
        tokio::time::sleep(self.chance.millis(5, 60)).await;
        self.given_time().await;
        let now = self.now();
        let (generation, rejected) = {
            let mut state = self.state();
            let leaving = state.apps.keys().filter(|app| leaves(&state, app)).cloned().collect();
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
                // The template that it names is broken: its last good part stays.
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
            new.follow(&old, served.then_some(proxy.since), now);
            let generation = new.generation;
            let live = new.clone();
            (proxy.live, proxy.published, proxy.drifted) = (Some(new), now, false);
            for app in vhosts.keys().filter(|app| old.vhosts.get(*app) != live.vhosts.get(*app)) {
                proxy.written.insert(app.clone(), Instant::now());
            }
            state.leaving = leaving;
            (generation, rejected)
        };
        self.happens("nginx set", || format!("generation {generation}: {:?}", vhosts.keys().collect::<Vec<_>>()));
        // The agent may end here: the new set lies on disk, and the old one is served.
        tokio::time::sleep(self.chance.millis(0, 5)).await;
        self.given_time().await;
        self.load().await?;
        Ok(Published { generation, reloaded: true, rejected })
    }

    pub async fn reload(&self) -> Result<(), NginxError> {
        tokio::time::sleep(self.chance.millis(1, 10)).await;
        self.given_time().await;
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
        if self.state().proxy.deaf {
            tokio::time::sleep(Duration::from_secs(10)).await;
            let last = "it answers with the one before".to_owned();
            return Err(NginxError::NotProven { generation, last });
        }
        self.serve_live(true);
        tokio::time::sleep(self.chance.millis(1, 150)).await;
        Ok(())
    }

    /// Workers take the set on disk over: by a reload, or since nginx was started.
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
        self.happens("nginx serves", String::new);
    }
}
