//! Looks now and then at what comes to its end without anybody changing anything: disks and certificates.

use std::{path::PathBuf, time::Duration};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    host::{certificate, files},
    metrics::{Disk, Vitals},
};

/// Between two looks. Disks fill in minutes at worst, and a look costs a few system calls.
const EVERY: Duration = Duration::from_secs(15);

/// What is looked at.
#[derive(Debug, Clone)]
pub struct Places {
    /// Directories, and what each is for.
    pub dirs: Vec<(&'static str, PathBuf)>,
    /// Files with certificates.
    pub certificates: Vec<PathBuf>,
    /// A directory of nginx files that may name more of them.
    pub nginx: PathBuf,
}

/// Looks until cancelled. A disk that hangs holds up nothing but the next look.
pub async fn watch(places: Places, vitals: watch::Sender<Vitals>, token: CancellationToken) {
    loop {
        let look = places.clone();
        match tokio::task::spawn_blocking(move || look.look()).await {
            Ok(seen) => {
                vitals.send_modify(|v| {
                    v.disks = seen.disks;
                    v.certificates = seen.certificates;
                });
            }
            Err(e) => tracing::error!("disks and certificates could not be looked at: {e}"),
        }
        tokio::select! {
            () = token.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

impl Places {
    fn look(&self) -> Vitals {
        let mut seen = Vitals::default();
        for (dir, path) in &self.dirs {
            match files::space(path) {
                Ok((free, size)) => seen.disks.push(Disk { dir, free, size }),
                Err(e) => tracing::debug!("{e}"),
            }
        }
        let mut paths = self.certificates.clone();
        paths.extend(certificate::named_in(&self.nginx));
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
