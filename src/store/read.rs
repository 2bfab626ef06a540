//! One consistent read of the store, and what it means.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use etcd_client::{Compare, CompareOp, GetOptions, SortOrder, SortTarget, Txn, TxnOp};
use sha2::{Digest as _, Sha256};

use super::{
    client::{Connection, StoreError},
    keys::{BadKey, Key, Prefix},
    landmark::Landmark,
    last_good::Entries,
    standing::Identity,
};
use crate::model::{
    desired::{self, DesiredApp, HostMode, Snapshot, Target},
    name::{AppName, HostName},
    problem::{Problem, Problems, guarded},
    release::ReleaseKey,
    spec::Spec,
    text::hex,
    yaml::{self, Value},
};

/// Keys of one page. With the largest value etcd takes (1.5 MiB) a page of this size fits the decoding limit below in
/// any store of ordinary size.
const PAGE: i64 = 500;
/// Most bytes of a host's labels.
const MOST_LABELS: usize = 64 * 1024;
/// Largest answer that is decoded: the client's own limit of 4 MiB is reached by a thousand specs.
pub(super) const LARGEST: usize = 256 << 20;

/// A value, and when it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    value: Vec<u8>,
    created: i64,
    modified: i64,
}

impl Entry {
    /// What was read, the revision it was made at, and that of its last change.
    pub fn new(value: Vec<u8>, created: i64, modified: i64) -> Self {
        Self { value, created, modified }
    }

    /// What was read.
    pub fn value(&self) -> &[u8] {
        &self.value
    }

    /// The revision it was made at.
    pub fn created(&self) -> i64 {
        self.created
    }

    pub(super) fn modified(&self) -> i64 {
        self.modified
    }
}

/// All that people wrote, at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    pub(super) entries: BTreeMap<Vec<u8>, Entry>,
    pub(super) revision: i64,
}

impl Contents {
    /// All keys without their prefix, at a revision.
    pub fn new(entries: BTreeMap<Vec<u8>, Entry>, revision: i64) -> Self {
        Self { entries, revision }
    }

    /// What `cluster` says. Blanks around it are an editor's.
    pub(super) fn cluster(&self) -> Option<String> {
        let entry = self.entries.get(b"cluster".as_slice())?;
        Some(String::from_utf8_lossy(&entry.value).trim().to_owned())
    }
}

/// A full read of a store.
#[derive(Debug, Clone)]
pub struct Reading {
    /// What people wrote.
    pub contents: Contents,
    /// Which store it was.
    pub identity: Identity,
    /// The key that release ids are made with, if it has one.
    pub key: Option<ReleaseKey>,
    /// What was read of it before, and is not in its history.
    pub forgotten: Option<Landmark>,
}

/// Reads everything at one revision, page by page, and looks for what it must know if it is the store from before.
///
/// # Errors
/// If a call fails.
pub async fn read(connection: &Connection, prefix: &Prefix, landmark: Option<Landmark>) -> Result<Reading, StoreError> {
    let mut kv = connection.client.kv_client().max_decoding_message_size(LARGEST);
    let failed = connection.failed("reading");
    let (mut from, to) = prefix.intent();
    let mut contents = Contents::default();
    let mut etcd = 0;
    loop {
        let mut options =
            GetOptions::new().with_range(to.clone()).with_limit(PAGE).with_sort(SortTarget::Key, SortOrder::Ascend);
        if contents.revision > 0 {
            options = options.with_revision(contents.revision);
        }
        let answer = kv.get(from.clone(), Some(options)).await.map_err(&failed)?;
        if contents.revision == 0 {
            contents.revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
            etcd = answer.header().map_or(0, etcd_client::ResponseHeader::cluster_id);
        }
        for kv in answer.kvs() {
            if let Some(rest) = prefix.strip(kv.key()) {
                let entry = Entry::new(kv.value().to_vec(), kv.create_revision(), kv.mod_revision());
                contents.entries.insert(rest.to_vec(), entry);
            }
        }
        match answer.kvs().last() {
            // The first key after the last one.
            Some(last) if answer.more() => from = [last.key(), &[0]].concat(),
            _ => break,
        }
    }
    let key = release_key(connection, prefix).await?;
    let fingerprint = key.as_ref().map(fingerprint);
    let (cluster, revision) = (contents.cluster(), contents.revision);
    let identity = Identity { cluster, etcd, revision, whole: revision, key: fingerprint };
    // Asked last: if the store is exchanged meanwhile, the new one is asked, and not the one that is gone.
    let forgotten = match landmark.filter(|l| !l.is_in(&contents)) {
        Some(landmark) => landmark.is_unknown_to(connection, prefix, contents.revision).await?.then_some(landmark),
        None => None,
    };
    Ok(Reading { contents, identity, key, forgotten })
}

/// Stands for a release key without telling it.
pub fn fingerprint(key: &ReleaseKey) -> String {
    hex(&Sha256::digest(key.expose())[..8])
}

pub(super) async fn release_key(connection: &Connection, prefix: &Prefix) -> Result<Option<ReleaseKey>, StoreError> {
    let failed = connection.failed("reading the release key");
    let answer = connection.client.kv_client().get(prefix.release_key(), None).await.map_err(failed)?;
    Ok(answer.kvs().first().map(|kv| ReleaseKey::new(kv.value())))
}

/// Gives a store that has none the key that release ids are made with: the one that is known, since with another one
/// every release would have another id, and every container would be replaced; else a new one.
///
/// # Errors
/// If a call fails.
pub(super) async fn make_release_key(
    connection: &Connection,
    prefix: &Prefix,
    known: Option<&ReleaseKey>,
) -> Result<ReleaseKey, StoreError> {
    let key = prefix.release_key();
    let fresh = match known {
        Some(known) => known.expose().to_vec(),
        None => random_id().map_err(|source| StoreError::File { path: "/dev/urandom".into(), source })?.into_bytes(),
    };
    // Whoever is first makes it; everybody else reads what the first one made.
    let create = Txn::new().when([Compare::create_revision(key.clone(), CompareOp::Equal, 0)]).and_then([TxnOp::put(
        key.clone(),
        fresh,
        None,
    )]);
    let mut kv = connection.client.kv_client();
    kv.txn(create).await.map_err(connection.failed("making the release key"))?;
    release_key(connection, prefix).await?.ok_or_else(|| StoreError::Call {
        endpoint: connection.endpoint.clone(),
        operation: "reading the release key",
        reason: format!("`{key}` is gone right after it was made"),
    })
}

/// 256 random bits, as text that survives a terminal.
pub(super) fn random_id() -> std::io::Result<String> {
    let mut bytes = [0u8; 32];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(hex(&bytes))
}

/// A spec, or all that is wrong with it.
type ReadSpec = Arc<Result<Spec, Problems>>;

/// Makes snapshots of contents. Keeps what it has read, so that one changed key costs one spec.
#[derive(Clone)]
pub struct Reader {
    host: HostName,
    labels: BTreeMap<String, String>,
    /// By app, with the text that it was read from.
    specs: HashMap<AppName, (Vec<u8>, ReadSpec)>,
    last_good: BTreeMap<AppName, Target>,
    /// The mode that the store last had for this host; `None` while it has never been seen to have a good one.
    mode: Option<HostMode>,
    /// The labels that the store last had for this host; `None` while it has never been seen to have good ones.
    host_labels: Option<BTreeMap<String, String>>,
}

impl Reader {
    /// For a host with these labels of its own.
    pub fn new(host: HostName, labels: BTreeMap<String, String>) -> Self {
        Self { host, labels, specs: HashMap::new(), last_good: BTreeMap::new(), mode: None, host_labels: None }
    }

    /// Takes that an app was like this when it last made sense, on a host with these keys of its own.
    pub(super) fn remember(&mut self, app: &AppName, entries: &Entries, hosts: &Entries, key: &ReleaseKey) {
        let entries = entries.iter().chain(hosts).map(|(k, e)| (k.clone(), e.clone())).collect();
        let mut then = Self::new(self.host.clone(), self.labels.clone());
        then.snapshot(&Contents { entries, revision: 0 }, key);
        self.last_good.extend(then.last_good.remove_entry(app));
    }

    /// What the contents mean for this host.
    pub fn snapshot(&mut self, contents: &Contents, key: &ReleaseKey) -> Snapshot {
        let mut unreadable = Vec::new();
        let (keys, mode, labels) = self.sort_out(contents, &mut unreadable);
        let last_good = &self.last_good;
        let apps = desired::resolve(&keys, key, mode, &labels, |app| last_good.get(app).cloned());
        for (app, desired) in &apps {
            match desired {
                DesiredApp::Run(target) => {
                    self.last_good.insert(app.clone(), target.clone());
                }
                // What was wanted before it left is no reason to come back.
                DesiredApp::Absent(_) => {
                    self.last_good.remove(app);
                }
                DesiredApp::Invalid { .. } | DesiredApp::Paused(_) | DesiredApp::Kept(_) => {}
            }
        }
        self.last_good.retain(|app, _| apps.contains_key(app));
        Snapshot { revision: contents.revision, proven: true, mode, labels, apps, unreadable }
    }

    fn sort_out(
        &mut self,
        contents: &Contents,
        unreadable: &mut Vec<Problem>,
    ) -> (desired::Keys, HostMode, BTreeMap<String, String>) {
        let mut keys = desired::Keys::default();
        let mut mode = Some(HostMode::Active);
        let mut given_labels = Some(BTreeMap::new());
        for (rest, entry) in &contents.entries {
            let value = || Some(entry.value.clone());
            match Key::parse(rest) {
                Ok(Key::Spec(app)) => {
                    let spec = self.spec(&app, entry);
                    keys.apps.entry(app).or_default().spec = Some((entry.created, spec));
                }
                Ok(Key::Image(app)) => keys.apps.entry(app).or_default().image = value(),
                Ok(Key::Restart(app)) => keys.apps.entry(app).or_default().restart = value(),
                Ok(Key::Paused(app)) => keys.apps.entry(app).or_default().paused = value(),
                Ok(Key::Env(set, name)) => {
                    keys.env.entry(set).or_default().insert(name, entry.value.clone());
                }
                Ok(Key::HostLabels(host)) if host == self.host => match host_labels(&entry.value) {
                    Ok(labels) => given_labels = Some(labels),
                    Err(mut problem) => {
                        // Unreadable labels are not other labels.
                        given_labels = self.host_labels.clone();
                        problem.key = format!("hosts/{host}/labels");
                        unreadable.push(problem);
                    }
                },
                Ok(Key::HostMode(host)) if host == self.host => match host_mode(&entry.value) {
                    Some(found) => mode = Some(found),
                    None => {
                        // An unreadable mode is not a new mode.
                        mode = self.mode;
                        let problem = Problem::new(format!("hosts/{host}/mode"), "this is not a mode");
                        unreadable.push(problem.hint("use `active`, `cordoned` or `drained`"));
                    }
                },
                Ok(Key::HostLabels(_) | Key::HostMode(_) | Key::Cluster) => {}
                Err(BadKey::App(app, problem)) => keys.apps.entry(app).or_default().problems.push(problem),
                Err(BadKey::Set(set, problem)) => keys.env_problems.entry(set).or_default().push(problem),
                Err(BadKey::Nobody(problem)) => unreadable.push(problem),
            }
        }
        for problems in keys.env_problems.values_mut().chain(keys.apps.values_mut().map(|app| &mut app.problems)) {
            *problems = std::mem::take(problems).bounded();
        }
        let all: Problems = std::mem::take(unreadable).into_iter().collect();
        unreadable.extend(all.bounded().iter().cloned());
        keys.labels_unknown = given_labels.is_none();
        let mut labels = self.labels.clone();
        labels.extend(given_labels.iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
        self.host_labels = given_labels;
        self.mode = mode;
        // A host that was drained starts nothing for that, and one that was active stops nothing.
        let mode = mode.unwrap_or(HostMode::Cordoned);
        self.specs.retain(|app, _| keys.apps.contains_key(app));
        (keys, mode, labels)
    }

    fn spec(&mut self, app: &AppName, entry: &Entry) -> Arc<Result<Spec, Problems>> {
        match self.specs.get(app) {
            Some((text, spec)) if *text == entry.value => spec.clone(),
            _ => {
                let spec = Arc::new(guarded(|| Spec::parse(&entry.value)));
                self.specs.insert(app.clone(), (entry.value.clone(), spec.clone()));
                spec
            }
        }
    }
}

fn host_mode(value: &[u8]) -> Option<HostMode> {
    match std::str::from_utf8(value).ok()?.trim() {
        "active" => Some(HostMode::Active),
        "cordoned" => Some(HostMode::Cordoned),
        "drained" => Some(HostMode::Drained),
        _ => None,
    }
}

fn host_labels(value: &[u8]) -> Result<BTreeMap<String, String>, Problem> {
    let node = yaml::parse(value)?;
    let Value::Map(entries) = node.value else {
        return Err(Problem::new("", "write a mapping such as `role: web`").at(node.line, node.column));
    };
    // They are published with the host, and a store takes requests of 1.5 MiB.
    if value.len() > MOST_LABELS {
        let message = format!("{} bytes of labels are more than {MOST_LABELS}", value.len());
        return Err(Problem::new("", message).at(node.line, node.column));
    }
    let mut labels = BTreeMap::new();
    for (key, node) in entries {
        let Value::Scalar { text, .. } = node.value else {
            return Err(Problem::new(key.name, "a label has a single value").at(node.line, node.column));
        };
        labels.insert(key.name, text);
    }
    Ok(labels)
}
