//! Many apps that change at once: until all have converged, beside the bare steps of as many apps.
#![allow(clippy::disallowed_methods, reason = "a benchmark writes files of its own")]

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Instant,
};

use bollard::{Docker, query_parameters::CreateContainerOptionsBuilder};
use futures_util::StreamExt as _;

use super::{
    bare::{RemoveOnDrop, end, socket_container, switch_socket},
    figures::Figures,
};
use crate::support::lab::Lab;

/// Create, start, probe, switch, stop, remove for each app, some at a time.
pub const BARE: &str = "bare steps";
/// From the put until every app has converged.
pub const DEMAE: &str = "demae";
/// How many apps the bare steps take at a time: as many steps as demae runs at once.
const AT_A_TIME: usize = 8;

/// The figures of a run.
pub struct Outcome {
    pub apps: usize,
    pub figures: Figures,
    /// Reloads of nginx by demae.
    pub reloads: f64,
}

/// Changes so many apps at once in each round.
pub fn measure(apps: usize, rounds: usize) -> Outcome {
    let lab = Lab::new();
    let image = lab.image("v1");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let spec = |n: usize| lab.socket_spec(&image, &format!("app{n}.test"), "network_mode: none\n");
    super::change_all(&lab, apps, "spec", spec);
    let _containers = RemoveOnDrop(lab.host.clone());
    let mut bare = Bare { dir: lab.path("bare"), image, host: lab.host.clone(), old: vec![None; apps] };
    fs::create_dir_all(&bare.dir).expect("a directory");
    runtime.block_on(bare.change_all(0));
    let reloads = lab.metric("demae_nginx_reloads_total", "done");
    let mut figures = Figures::default();
    for round in 1..=rounds {
        let mut order = [BARE, DEMAE];
        order.rotate_left(round % 2);
        for column in order {
            let began = Instant::now();
            if column == DEMAE {
                super::change_all(&lab, apps, "restart", |_| format!("round {round}"));
            } else {
                runtime.block_on(bare.change_all(round));
            }
            figures.push(column, began.elapsed());
        }
    }
    let reloads = lab.metric("demae_nginx_reloads_total", "done") - reloads;
    Outcome { apps, figures, reloads }
}

struct Bare {
    dir: PathBuf,
    image: String,
    host: String,
    old: Vec<Option<String>>,
}

impl Bare {
    async fn change_all(&mut self, round: usize) {
        let docker = Docker::connect_with_unix_defaults().expect("Docker");
        let (dir, image, host) = (&self.dir, &self.image, &self.host);
        let olds = std::mem::take(&mut self.old).into_iter().enumerate();
        let change = |(n, old): (usize, Option<String>)| change(&docker, dir, image, host, (n, round), old);
        self.old = futures_util::stream::iter(olds.map(change)).buffered(AT_A_TIME).map(Some).collect().await;
    }
}

/// The bare steps of one app; returns its container.
async fn change(
    docker: &Docker,
    dir: &Path,
    image: &str,
    host: &str,
    (n, round): (usize, usize),
    old: Option<String>,
) -> String {
    let own = dir.join(format!("{n}-{round}"));
    fs::create_dir(&own).expect("a directory");
    let options = CreateContainerOptionsBuilder::default().name(&format!("{host}-bare-{n}-{round}")).build();
    let body = socket_container(image, host, &own);
    let id = docker.create_container(Some(options), body).await.expect("created").id;
    docker.start_container(&id, None).await.expect("started");
    switch_socket(&own.join("app.sock"), &dir.join(format!("current-{n}"))).await;
    if let Some(old) = old {
        end(docker, &old).await;
    }
    id
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} apps changed at once, until all have converged\n{}", self.apps, self.figures.table(BARE))?;
        writeln!(f, "reloads of nginx by demae: {}", self.reloads)
    }
}
