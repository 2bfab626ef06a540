//! Images that an agent has pulled, and which of them are still needed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    name::{AppName, ImageDigest},
    time::Timestamp,
};

/// How many images of an app stay, those that it had converged on last: one serves, and two are there to go back to.
pub const KEPT: usize = 3;

/// How often a registry is asked for an image that it does not have, until that is a failure of the release: one that was
/// pushed a moment ago may not be everywhere yet.
pub const ASKED: u32 = 3;

/// An image that the agent has pulled. Others are never touched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    /// Its id on this host.
    pub id: String,
    /// What the registry called it then; `None` if it was loaded from a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<ImageDigest>,
    /// When it was pulled last.
    pub pulled: Timestamp,
    /// Apps that it was pulled for, and when each had last converged on it; `None` if never. A release that failed is no way
    /// back.
    pub apps: BTreeMap<AppName, Option<Timestamp>>,
}

impl Pulled {
    /// When it was pulled, or an app had converged on it last.
    pub fn used(&self) -> Timestamp {
        self.apps.values().flatten().copied().chain([self.pulled]).max().unwrap_or(self.pulled)
    }
}

/// Images by their reference, with the tag.
pub type PulledImages = BTreeMap<String, Pulled>;

/// What needs images now.
#[derive(Debug, Clone)]
pub struct Needs<'a> {
    /// Ids of the images of all containers, running or not, also of others.
    pub containers: &'a BTreeSet<String>,
    /// What the apps of this host want, by reference.
    pub wanted: &'a BTreeMap<AppName, Option<String>>,
    /// What is being pulled, by reference.
    pub pulling: &'a BTreeSet<String>,
    /// The time.
    pub now: Timestamp,
    /// How long an image stays at least after it was used.
    pub keep_for: Duration,
}

/// Why an image stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// It is being pulled.
    Pulling,
    /// A container has it.
    Container,
    /// An app wants it.
    Wanted(AppName),
    /// It is one of the last that an app had converged on.
    Recent(AppName),
    /// It was used a short while ago.
    Young,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pulling => f.write_str("it is being pulled"),
            Self::Container => f.write_str("a container has it"),
            Self::Wanted(app) => write!(f, "{app} wants it"),
            Self::Recent(app) => write!(f, "{app} may go back to it"),
            Self::Young => f.write_str("it was used a short while ago"),
        }
    }
}

impl Needs<'_> {
    /// Why an image stays; `None` if it may be removed.
    pub fn reason(&self, images: &PulledImages, reference: &str) -> Option<Reason> {
        let image = images.get(reference)?;
        if self.pulling.contains(reference) {
            return Some(Reason::Pulling);
        }
        if self.containers.contains(&image.id) {
            return Some(Reason::Container);
        }
        if let Some((app, _)) = self.wanted.iter().find(|(_, wanted)| wanted.as_deref() == Some(reference)) {
            return Some(Reason::Wanted(app.clone()));
        }
        // Two references may name one image, and either is a way back to it.
        let is_recent = |app: &&AppName| self.wanted.contains_key(*app) && recent(images, app).contains(&reference);
        if let Some(app) = image.apps.keys().find(is_recent) {
            return Some(Reason::Recent(app.clone()));
        }
        (self.now.since(image.used()) < self.keep_for).then_some(Reason::Young)
    }

    /// Images that may be removed, those first that were not used for longest.
    pub fn removable<'i>(&self, images: &'i PulledImages) -> Vec<&'i str> {
        let mut found: Vec<&str> =
            images.keys().map(String::as_str).filter(|reference| self.reason(images, reference).is_none()).collect();
        found.sort_by_key(|reference| images.get(*reference).map(Pulled::used));
        found
    }
}

/// The last images that an app had converged on.
fn recent<'i>(images: &'i PulledImages, app: &AppName) -> Vec<&'i str> {
    let converged = |(reference, image): (&'i String, &Pulled)| Some(((*image.apps.get(app)?)?, reference.as_str()));
    let mut own: Vec<(Timestamp, &str)> = images.iter().filter_map(converged).collect();
    own.sort_by(|a, b| b.cmp(a));
    own.into_iter().take(KEPT).map(|(_, reference)| reference).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn app(n: u8) -> AppName {
        AppName::try_from(format!("app{n}").as_str()).expect("a name")
    }

    /// A day in the life of a host.
    #[derive(Debug, Clone)]
    enum Event {
        /// An app wants the image of this number, which may fail.
        Deploy(u8, u8),
        /// It has converged on what it wants.
        Converge(u8),
        Delete(u8),
        /// A container of the image is there, or goes.
        Container(u8, bool),
        Minutes(u16),
        /// All that may go is removed.
        Clean,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => (0..3u8, 0..12u8).prop_map(|(app, image)| Event::Deploy(app, image)),
            3 => (0..3u8).prop_map(Event::Converge),
            1 => (0..3u8).prop_map(Event::Delete),
            1 => (0..12u8, any::<bool>()).prop_map(|(image, there)| Event::Container(image, there)),
            2 => (0..200u16).prop_map(Event::Minutes),
            2 => Just(Event::Clean),
        ]
    }

    proptest! {
        /// Held to a second account of the same history: the order in which each app converged on its images.
        #[test]
        fn ways_back_and_what_is_in_use_are_never_removed(events in prop::collection::vec(event(), 1..60)) {
            let keep_for = Duration::from_secs(3600);
            let (mut images, mut wanted, mut containers) = (PulledImages::new(), BTreeMap::new(), BTreeSet::new());
            let mut orders: BTreeMap<AppName, Vec<String>> = BTreeMap::new();
            let mut touched: BTreeMap<String, i64> = BTreeMap::new();
            let mut millis = 1_000_000_000_000_i64;
            for event in events {
                millis += 1;
                let now = Timestamp::from_millis(millis);
                match event {
                    Event::Deploy(n, image) => {
                        let reference = format!("r/x:{image}");
                        let pulled = images.entry(reference.clone()).or_insert_with(|| Pulled {
                            id: format!("id{image}"), digest: None, pulled: now, apps: BTreeMap::new(),
                        });
                        pulled.apps.entry(app(n)).or_default();
                        pulled.pulled = now;
                        touched.insert(reference.clone(), millis);
                        wanted.insert(app(n), Some(reference));
                    }
                    Event::Converge(n) => {
                        let Some(Some(reference)) = wanted.get(&app(n)).cloned() else { continue };
                        let Some(image) = images.get_mut(&reference) else { continue };
                        image.apps.insert(app(n), Some(now));
                        touched.insert(reference.clone(), millis);
                        let order = orders.entry(app(n)).or_default();
                        order.retain(|known| *known != reference);
                        order.push(reference);
                    }
                    Event::Delete(n) => { wanted.remove(&app(n)); }
                    Event::Container(image, true) => { containers.insert(format!("id{image}")); }
                    Event::Container(image, false) => { containers.remove(&format!("id{image}")); }
                    Event::Minutes(minutes) => millis += i64::from(minutes) * 60_000,
                    Event::Clean => {
                        let pulling = BTreeSet::new();
                        let needs = Needs { containers: &containers, wanted: &wanted, pulling: &pulling, now, keep_for };
                        let going: Vec<String> = needs.removable(&images).into_iter().map(str::to_owned).collect();
                        for reference in &going {
                            prop_assert!(!containers.contains(&images[reference].id), "{reference} is in use");
                            let is_wanted = wanted.values().any(|wanted| wanted.as_ref() == Some(reference));
                            prop_assert!(!is_wanted, "{reference} is wanted");
                            prop_assert!(millis - touched[reference] >= 3_600_000, "{reference} is young");
                            for (app, order) in &orders {
                                let last: Vec<_> = order.iter().rev().take(KEPT).collect();
                                prop_assert!(!wanted.contains_key(app) || !last.contains(&reference), "{app}: {reference}");
                            }
                        }
                        for reference in &going {
                            images.remove(reference);
                            orders.values_mut().for_each(|order| order.retain(|known| known != reference));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let at = Timestamp::from_millis;
        let pulled = |at: Timestamp| Pulled { id: "x".to_owned(), digest: None, pulled: at, apps: BTreeMap::new() };
        let images: PulledImages =
            [("b", 5), ("a", 9), ("c", 1)].map(|(name, t)| (name.to_owned(), pulled(at(t)))).into();
        let (containers, wanted, pulling) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::from(["c".to_owned()]));
        let keep_for = Duration::from_millis(2);
        let needs = Needs { containers: &containers, wanted: &wanted, pulling: &pulling, now: at(20), keep_for };
        assert_eq!(needs.removable(&images), ["b", "a"]);
        assert_eq!(needs.reason(&images, "c"), Some(Reason::Pulling));
        assert_eq!(Needs { now: at(10), ..needs }.reason(&images, "a"), Some(Reason::Young));
    }
}
