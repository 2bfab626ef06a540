//! The slots of apps on disk, and their stable addresses.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    sync::PoisonError,
};

use serde::{Deserialize, Serialize};

use super::{Elements, TcpRouteError, TcpRoutes};
use crate::{
    host::files::{self, FileError},
    model::{name::AppName, observed::InstanceKey},
};

/// The slots of an app, as on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppSlots(pub BTreeMap<u16, Slot>);

/// One slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its stable address, the same until the app leaves this host.
    pub address: Ipv4Addr,
    /// Where it leads; `None` while it leads nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Lead>,
}

/// Where a slot leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lead {
    /// The instance.
    pub instance: InstanceKey,
    /// Its own address.
    pub at: SocketAddrV4,
}

/// The slots of all apps.
#[derive(Debug, Default)]
pub(super) struct OnDisk {
    pub(super) slots: BTreeMap<AppName, AppSlots>,
    /// Whether there are more, which cannot be read.
    pub(super) has_unreadable: bool,
}

impl OnDisk {
    pub(super) fn elements(&self) -> Elements {
        let slots = self.slots.values().flat_map(|slots| slots.0.values());
        slots.filter_map(|slot| Some((slot.address, slot.to.as_ref()?.at))).collect()
    }
}

/// Stable addresses that apps are to get with their first switch.
#[derive(Debug, Default)]
pub(super) struct Reserved {
    pub(super) apps: BTreeMap<AppName, BTreeMap<u16, Ipv4Addr>>,
    /// The one given last.
    last: Option<Ipv4Addr>,
}

impl Reserved {
    fn of(&self, app: &AppName) -> impl Iterator<Item = (u16, Ipv4Addr)> {
        self.apps.get(app).into_iter().flatten().map(|(n, address)| (*n, *address))
    }
}

impl TcpRoutes {
    /// The slots of an app on disk.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn read(&self, app: &AppName) -> Result<AppSlots, FileError> {
        let path = self.layout.tcp_route(app);
        let Some(text) = files::read(&path)? else { return Ok(AppSlots::default()) };
        let why = "; without it the app gets other stable addresses, after a switch";
        serde_json::from_slice(&text).map_err(|e| FileError::unreadable(&path, &e.to_string(), why))
    }

    /// The stable addresses of the slots of an app: those it has, and new ones up to this number, unless too few are
    /// free. The search begins after the last one given: an older nginx worker may still know those of an app that left.
    ///
    /// # Errors
    /// If the files of all apps cannot be listed.
    pub fn stable_addresses(
        &self,
        app: &AppName,
        slots: &AppSlots,
        count: u16,
    ) -> Result<BTreeMap<u16, Ipv4Addr>, TcpRouteError> {
        let mut known: BTreeMap<u16, Ipv4Addr> = slots.0.iter().map(|(n, slot)| (*n, slot.address)).collect();
        if (1..=count).all(|n| known.contains_key(&n)) {
            return Ok(known);
        }
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        known.extend(reserved.of(app).filter(|(n, _)| !slots.0.contains_key(n)));
        let missing: Vec<u16> = (1..=count).filter(|n| !known.contains_key(n)).collect();
        if !missing.is_empty() {
            let on_disk = self.all()?;
            let mut taken: BTreeSet<Ipv4Addr> = reserved.apps.values().flat_map(BTreeMap::values).copied().collect();
            taken.extend(on_disk.slots.values().flat_map(|slots| slots.0.values()).map(|slot| slot.address));
            // Those of an app whose file cannot be read are in the table, if they lead anywhere.
            if let Ok(known) = self.kernel.try_lock() {
                taken.extend(known.elements.iter().flatten().map(|(address, _)| *address));
            }
            let after = reserved.last.or(taken.last().copied());
            let all = || self.settings.range.hosts().filter(|address| !taken.contains(address));
            let later = all().filter(|address| after.is_none_or(|after| *address > after));
            let earlier = all().filter(|address| after.is_some_and(|after| *address <= after));
            let free: Vec<Ipv4Addr> = later.chain(earlier).take(missing.len()).collect();
            if free.len() < missing.len() {
                tracing::warn!(app = %app, "{}", TcpRouteError::NoStableAddress(self.settings.range));
                return Ok(known);
            }
            reserved.last = free.last().copied();
            known.extend(missing.into_iter().zip(free));
        }
        reserved.apps.insert(app.clone(), known.clone());
        Ok(known)
    }

    /// The slots of all apps on disk.
    pub(super) fn all(&self) -> Result<OnDisk, FileError> {
        let mut found = OnDisk::default();
        for name in files::list(&self.layout.tcp_routes())? {
            let Ok(app) = AppName::try_from(name) else { continue };
            match self.read(&app) {
                Ok(slots) => drop(found.slots.insert(app, slots)),
                // The observation of that app reports why.
                Err(_) => found.has_unreadable = true,
            }
        }
        Ok(found)
    }
}
