//! Watches resources that run out by themselves: disks and certificates.

use std::{path::PathBuf, time::Duration};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    host::{certificate, files, tcp_routes},
    metrics::{Disk, HostGauges},
};

/// Interval between two readings. Disks fill in minutes at worst, and a reading costs a few system calls.
const INTERVAL: Duration = Duration::from_secs(15);

/// What is watched.
#[derive(Debug, Clone)]
pub struct Watched {
    /// Directories, each with its purpose.
    pub dirs: Vec<(&'static str, PathBuf)>,
    /// Files with certificates.
    pub certificates: Vec<PathBuf>,
    /// A directory of nginx files that may name more certificates.
    pub nginx: PathBuf,
}

/// Reads until cancelled. A disk that hangs delays only the next reading.
pub async fn watch(watched: Watched, gauges: watch::Sender<HostGauges>, token: CancellationToken) {
    loop {
        let watched = watched.clone();
        match tokio::task::spawn_blocking(move || watched.read()).await {
            Ok(seen) => {
                gauges.send_modify(|v| {
                    v.disks = seen.disks;
                    v.certificates = seen.certificates;
                    v.conntrack = seen.conntrack;
                });
            }
            Err(e) => tracing::error!("disks and certificates could not be read: {e}"),
        }
        tokio::select! {
            () = token.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

impl Watched {
    fn read(&self) -> HostGauges {
        let mut seen = HostGauges { conntrack: tcp_routes::conntrack(), ..HostGauges::default() };
        for (dir, path) in &self.dirs {
            match files::space(path) {
                Ok((free, size)) => seen.disks.push(Disk { dir, free, size }),
                Err(e) => tracing::debug!("{e}"),
            }
        }
        let mut paths = self.certificates.clone();
        paths.extend(certificate::in_nginx_files(&self.nginx));
        paths.sort();
        paths.dedup();
        for path in paths {
            match certificate::expiry(&path) {
                Ok(at) => seen.certificates.push((path.display().to_string(), at)),
                Err(e) => tracing::debug!("{e}"),
            }
        }
        seen
    }
}
