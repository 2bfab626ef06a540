//! Routes to apps that listen on TCP: nginx connects to a stable address, and a table of the kernel leads each new
//! connection to the instance that serves. A switch is one transaction of the kernel, and nginx is not reloaded.
//!
//! What the table must say is on disk before the kernel is asked, one file per app. So the table can be put back at any
//! time: at boot before the agent runs, and by the agent whenever something else changed it.

mod addresses;
mod kernel;
mod look;
mod ruleset;
mod slots;

use std::{
    collections::{BTreeMap, HashSet},
    net::Ipv4Addr,
    path::Path,
    sync::{Mutex as SyncMutex, PoisonError},
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use tokio::sync::{Mutex, watch};

pub use kernel::CommandError;
pub use look::conntrack;
pub use ruleset::Elements;
use slots::Reserved;
pub use slots::{AppSlots, Lead, Slot};

use super::{
    docker::{Docker, DockerError, OwnAddress},
    files::{self, FileError},
    layout::Layout,
};
use crate::{
    failpoint,
    model::name::{AppName, HostName},
};
use addresses::Addresses;
use kernel::{ip, nft};
use ruleset::{Rules, parse};

/// The port of all stable addresses. Nothing listens there: one that other programs use would be answered by them
/// while an address leads nowhere.
pub const STABLE_PORT: u16 = 1;
/// How long the first look at this host may take before a container is created with a published port.
const FIRST_CHECK: Duration = Duration::from_secs(10);
/// How many addresses are handed out between two writes of the cursor.
const CURSOR_STEP: u32 = 16;

/// Settings of the routes of one agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Whether new containers get them.
    pub enabled: bool,
    /// Docker's network of the instances.
    pub network: String,
    /// Its interface on this host.
    pub bridge: String,
    /// Its addresses.
    pub subnet: Ipv4Net,
    /// The stable addresses, which this host uses for nothing else.
    pub range: Ipv4Net,
}

/// Why routes cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum TcpRouteError {
    /// The kernel, or the programs that change it.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Docker.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// What `nft` prints is not understood.
    #[error("`nft list table ip {0}` prints what cannot be read as demae's table")]
    Listing(String),
    /// No address is free.
    #[error("no address of {subnet} is free for a container: all {count} are held, or were in use less than {} s ago", addresses::REST.as_secs())]
    NoAddress {
        /// The network.
        subnet: Ipv4Net,
        /// How many there are.
        count: u32,
    },
    /// The instances of a release have addresses of their own, and another one cannot have one now.
    #[error("another instance beside those of the release needs an address of its own: {0}")]
    Unusable(String),
    /// No stable address is free.
    #[error("no stable address of {0} is free")]
    NoStableAddress(Ipv4Net),
}

/// The routes of one agent.
pub struct TcpRoutes {
    settings: Settings,
    table: String,
    layout: Layout,
    docker: Docker,
    /// What is known of the kernel's table; held while it is changed.
    kernel: Mutex<Known>,
    reserved: SyncMutex<Reserved>,
    addresses: Mutex<Option<(Addresses, u32)>>,
    /// Why new containers get published ports instead; `None` before the first look.
    usable: watch::Sender<Option<Result<(), String>>>,
}

/// What is known of the kernel's table.
#[derive(Debug, Default)]
struct Known {
    /// The content of its map, since it was last listed or changed here.
    elements: Option<Elements>,
    /// Everything else, as listed right after it was made.
    rules: Option<String>,
}

impl TcpRoutes {
    /// Does no I/O.
    pub fn new(settings: Settings, host: &HostName, layout: Layout, docker: Docker) -> Self {
        let name = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let table = format!("demae_{}", host.as_str().chars().map(name).collect::<String>());
        Self {
            settings,
            table,
            layout,
            docker,
            kernel: Mutex::default(),
            reserved: SyncMutex::default(),
            addresses: Mutex::default(),
            usable: watch::Sender::new(None),
        }
    }

    /// Docker's network of the instances, by name.
    pub fn network(&self) -> &str {
        &self.settings.network
    }

    fn rules(&self) -> Rules<'_> {
        Rules { table: &self.table, range: self.settings.range, bridge: &self.settings.bridge }
    }

    /// Why new containers get published ports instead; `None` if they do not. The first look at this host is waited
    /// for.
    pub async fn why_unusable(&self) -> Option<String> {
        let mut usable = self.usable.subscribe();
        let known = tokio::time::timeout(FIRST_CHECK, usable.wait_for(Option::is_some)).await;
        match known {
            Ok(Ok(known)) => known.clone().and_then(Result::err),
            _ => Some("this host has not been looked at yet".to_owned()),
        }
    }

    /// Whether new containers get addresses of their own, as known now.
    pub fn is_usable(&self) -> bool {
        matches!(*self.usable.borrow(), Some(Ok(())))
    }

    /// Why they do not, as known now, unless it is so by this host's settings.
    pub fn trouble(&self) -> Option<String> {
        self.usable.borrow().clone().and_then(Result::err).filter(|_| self.settings.enabled)
    }

    /// Whether new containers get addresses of their own, by what an agent has left on this host.
    pub fn is_ready(&self) -> bool {
        self.settings.enabled && Path::new("/sys/class/net").join(&self.settings.bridge).exists()
    }

    /// The content of the kernel's map.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn elements(&self) -> Result<Elements, TcpRouteError> {
        let mut known = self.kernel.lock().await;
        if let Some(elements) = &known.elements {
            return Ok(elements.clone());
        }
        let (elements, _) = self.list().await?.unwrap_or_default();
        known.elements = Some(elements.clone());
        Ok(elements)
    }

    /// Lists the table; `None` if there is none.
    async fn list(&self) -> Result<Option<(Elements, String)>, TcpRouteError> {
        match nft(&["list", "table", "ip", &self.table], None).await {
            Ok(text) => Ok(Some(parse(&text).ok_or_else(|| TcpRouteError::Listing(self.table.clone()))?)),
            Err(CommandError::Failed { message, .. }) if message.contains("No such file or directory") => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Leads the slots of an app to these instances, and all its other slots nowhere.
    ///
    /// # Errors
    /// If the file cannot be written, or the kernel does not take it. It can be repeated.
    pub async fn switch(
        &self,
        app: &AppName,
        leads: &BTreeMap<u16, Lead>,
        addresses: &BTreeMap<u16, Ipv4Addr>,
    ) -> Result<(), TcpRouteError> {
        let mut known = self.kernel.lock().await;
        let before = self.read(app)?;
        let mut slots = before.clone();
        for (n, address) in addresses {
            slots.0.entry(*n).or_insert(Slot { address: *address, to: None });
        }
        if leads.keys().any(|n| !slots.0.contains_key(n)) {
            return Err(TcpRouteError::NoStableAddress(self.settings.range));
        }
        for (n, slot) in &mut slots.0 {
            slot.to = leads.get(n).cloned();
        }
        // Also if it says the same: drains count from its last change.
        files::make_dir(&self.layout.tcp_routes(), 0o755)?;
        let text = serde_json::to_vec(&slots).map_err(std::io::Error::other);
        let path = self.layout.tcp_route(app);
        files::write(&path, &text.map_err(|e| FileError::cannot_write(&path, e))?, 0o644)?;
        failpoint::boundary("written");
        let own = |slots: &AppSlots| -> Elements {
            slots.0.values().filter_map(|slot| Some((slot.address, slot.to.as_ref()?.at))).collect()
        };
        let change = |elements: &Elements| {
            let mut wanted = elements.clone();
            wanted.retain(|address, _| !slots.0.values().any(|slot| slot.address == *address));
            wanted.extend(own(&slots));
            wanted
        };
        if let Some(elements) = known.elements.take() {
            let wanted = change(&elements);
            let text = self.rules().change(&elements, &wanted);
            if text.is_empty() || nft(&["-f", "-"], Some(&text)).await.is_ok() {
                known.elements = Some(wanted);
                return Ok(());
            }
        }
        // Something else changed the table.
        self.put_back(&mut known).await
    }

    /// Makes the table say what the files say.
    async fn put_back(&self, known: &mut Known) -> Result<(), TcpRouteError> {
        let listed = self.list().await?;
        let disk = self.all()?;
        let mut wanted: Elements = disk.elements();
        if let Some((elements, _)) = listed.as_ref().filter(|_| disk.has_unreadable) {
            // An entry that no file explains may be of an app whose file cannot be read.
            let unexplained = elements.iter().filter(|(address, _)| !wanted.contains_key(address));
            let unexplained: Elements = unexplained.map(|(address, to)| (*address, *to)).collect();
            wanted.extend(unexplained);
        }
        let is_whole = |rules: &String| known.rules.as_ref() == Some(rules);
        match listed {
            Some((elements, rules)) if is_whole(&rules) => {
                let change = self.rules().change(&elements, &wanted);
                if !change.is_empty() {
                    nft(&["-f", "-"], Some(&change)).await?;
                }
            }
            _ => {
                nft(&["-f", "-"], Some(&self.rules().whole(&wanted))).await?;
                known.rules = self.list().await?.map(|(_, rules)| rules);
            }
        }
        known.elements = Some(wanted);
        Ok(())
    }

    /// Removes everything of an app.
    ///
    /// # Errors
    /// As [`switch`](Self::switch).
    pub async fn forget(&self, app: &AppName) -> Result<(), TcpRouteError> {
        let path = self.layout.tcp_route(app);
        if files::modified(&path)?.is_some() {
            if self.read(app)?.0.values().any(|slot| slot.to.is_some()) {
                self.switch(app, &BTreeMap::new(), &BTreeMap::new()).await?;
            }
            files::remove_file(&path)?;
        }
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).apps.remove(app);
        Ok(())
    }

    /// A fixed address for a new container.
    ///
    /// # Errors
    /// If none is free.
    pub async fn allocate(&self) -> Result<OwnAddress, TcpRouteError> {
        let mut guard = self.addresses.lock().await;
        let cursor = self.layout.address_cursor();
        let (addresses, ahead) = match &mut *guard {
            Some(known) => known,
            None => {
                let text = files::read(&cursor)?.unwrap_or_default();
                let from = String::from_utf8_lossy(&text).trim().parse().ok();
                guard.insert((Addresses::new(self.settings.subnet, from), 0))
            }
        };
        let mut taken = addresses.take(Instant::now());
        if taken.is_none() {
            let listed = self.docker.list(None).await?;
            let held: HashSet<Ipv4Addr> = listed.into_iter().filter_map(|container| container.address).collect();
            addresses.begin_round(held);
            taken = addresses.take(Instant::now());
        }
        let (subnet, count) = (self.settings.subnet, addresses.count());
        let ip = taken.ok_or(TcpRouteError::NoAddress { subnet, count })?;
        if *ahead == 0 {
            files::write(&cursor, addresses.resume_at(CURSOR_STEP).to_string().as_bytes(), 0o644)?;
            *ahead = CURSOR_STEP;
        }
        *ahead -= 1;
        Ok(OwnAddress { network: self.settings.network.clone(), ip })
    }

    /// The container of an address is gone.
    pub async fn release(&self, address: Ipv4Addr) {
        if let Some((addresses, _)) = &mut *self.addresses.lock().await {
            addresses.release(address, Instant::now());
        }
    }

    /// Puts the route and the table back if any app has slots. Returns how many lead somewhere.
    ///
    /// # Errors
    /// If files cannot be read, or the kernel does not take them.
    pub async fn restore_if_any(&self) -> Result<usize, TcpRouteError> {
        let disk = self.all()?;
        if !disk.slots.is_empty() {
            self.restore().await?;
        }
        Ok(disk.elements().len())
    }

    /// Puts the route and the table back, as they are on disk.
    ///
    /// # Errors
    /// If the kernel does not take them.
    pub async fn restore(&self) -> Result<(), TcpRouteError> {
        let range = self.settings.range.to_string();
        ip(&["-4", "route", "replace", "local", &range, "dev", "lo"]).await?;
        let mut known = self.kernel.lock().await;
        known.elements = None;
        self.put_back(&mut known).await
    }
}
