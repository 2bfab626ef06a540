//! Verbs that write to the store and wait for the hosts: what they share.

pub(super) mod apply;
mod attempts;
mod author;
mod card;
pub(super) mod delete;
pub(super) mod deploy;
pub(super) mod diff;
pub(super) mod env;
pub(super) mod export;
pub(super) mod history;
pub(super) mod hosts;
pub(super) mod logs;
pub(super) mod pause;
mod progress;
pub(super) mod promote;
pub(super) mod redeploy;
mod report;
pub(super) mod retry;
pub(super) mod rollback;
mod running_logs;
pub(super) mod scale;
pub(super) mod store_status;
mod summary;
pub(super) mod table;
pub(super) mod takeover;
pub(super) mod wait;

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, stdin},
    path::PathBuf,
};

use tokio::time::Instant;

use super::{Ended, Failed, print::Printer, runtime};
use crate::{
    config::{self, Context, EtcdFlags, Flags},
    fleet::{
        outcome::{Outcome, Question, Until, Wanted, outcome},
        records::Records,
    },
    model::{
        fleet::FleetKey,
        name::{AppName, HostName, ReleaseId},
        release::ReleaseKey,
        status::AppStatus,
    },
    rollout::{FleetContents, takes_turns},
    store::{
        Edit, Entry, Everywhere, FleetSession, FleetWatch, StoreError,
        client::EtcdConfig,
        keys::{Key, parse_fleet},
    },
};

/// How often a change is decided anew if the same keys are written by others at the same time.
const TRIES: usize = 5;

/// The store, for verbs that need no agent.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Store")]
pub(super) struct StoreArgs {
    /// A store of `~/.config/demae/contexts.toml`, by its name
    #[arg(long, env = "DEMAE_CONTEXT", value_name = "NAME")]
    context: Option<String>,
    /// The agent's configuration file, for its `[etcd]`
    #[arg(long, env = "DEMAE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdFlags,
}

impl StoreArgs {
    /// The connection, to read.
    fn etcd(&self) -> Result<EtcdConfig, Failed> {
        if let Some(context) = self.context()? {
            return Ok(context.etcd);
        }
        let flags = Flags { config: self.config.clone(), etcd: self.etcd.clone(), ..Flags::default() };
        Ok(config::etcd_only(&flags)?)
    }

    fn context(&self) -> Result<Option<Context>, Failed> {
        let name = self.context.as_deref().filter(|name| !name.is_empty());
        Ok(name.map(config::context).transpose()?)
    }

    /// The connection, to write. Asks for the name of the context, if that wants it.
    fn etcd_to_write(&self, printer: &mut Printer) -> Result<EtcdConfig, Failed> {
        let Some(context) = self.context()?.filter(|context| context.confirm) else { return self.etcd() };
        if !stdin().is_terminal() {
            return Err(Failed::because(format!(
                "the context `{}` is to be confirmed by its name, and there is no terminal to ask on; nothing was written",
                context.name
            )));
        }
        printer.error(&format!("This changes `{}`. Type its name to go on:", context.name));
        let mut line = String::new();
        stdin().read_line(&mut line)?;
        if line.trim() == context.name { Ok(context.etcd) } else { Err(Failed::because("nothing was written")) }
    }
}

/// What the store says about the fleet, as of one revision.
struct Fleet {
    session: FleetSession,
    key: ReleaseKey,
    contents: FleetContents,
    statuses: BTreeMap<AppName, BTreeMap<HostName, (AppStatus, i64)>>,
    revision: i64,
}

/// The changes that follow.
struct Changes {
    desired: FleetWatch,
    state: FleetWatch,
}

impl Fleet {
    /// Reads it from the first member that answers.
    ///
    /// # Errors
    /// The last error; nothing was written.
    async fn read(config: &EtcdConfig) -> Result<Self, Failed> {
        let mut last = None;
        for turn in 0..config.endpoints.len() {
            match Self::read_from(config, turn).await {
                Ok(read) => return read,
                Err(e) => last = Some(e),
            }
        }
        let why = last.map_or_else(|| "no endpoint is configured".to_owned(), |e| e.to_string());
        Err(Failed::try_later(why))
    }

    async fn read_from(config: &EtcdConfig, turn: usize) -> Result<Result<Self, Failed>, StoreError> {
        let session = FleetSession::open(config, turn).await?;
        let Some(key) = session.release_key().await? else {
            let prefix = config.prefix.as_str();
            return Ok(Err(Failed::because(format!(
                "no agent has used the store below `{prefix}` yet (start one, or give the prefix by `--prefix`)"
            ))));
        };
        let reading = session.read(&session.client_ranges()).await?;
        let nameless = HostName::try_from("none").map_err(|e| Failed::because(e.to_string()));
        let nameless = match nameless {
            Ok(name) => name,
            Err(failed) => return Ok(Err(failed)),
        };
        let mut fleet = Self {
            session,
            key,
            contents: FleetContents::new(nameless),
            statuses: BTreeMap::new(),
            revision: reading.revision,
        };
        for (key, entry) in reading.entries {
            fleet.take(key, Some(entry));
        }
        fleet.contents.resolve(&fleet.key);
        Ok(Ok(fleet))
    }

    fn take(&mut self, key: Vec<u8>, entry: Option<Entry>) {
        if let Some(FleetKey::Status(host, app)) = parse_fleet(&key) {
            let hosts = self.statuses.entry(app).or_default();
            let status = entry.as_ref().and_then(|e| Some((serde_json::from_slice(e.value()).ok()?, e.modified())));
            match status {
                Some(status) => drop(hosts.insert(host, status)),
                None => drop(hosts.remove(&host)),
            }
        }
        self.contents.take(key, entry);
    }

    async fn changes(&self) -> Result<Changes, StoreError> {
        let [desired, state] = self.session.client_ranges();
        let first = self.revision + 1;
        Ok(Changes {
            desired: self.session.watch(desired, first).await?,
            state: self.session.watch(state, first).await?,
        })
    }

    /// Waits for the next changes, and takes them. Cancel-safe.
    ///
    /// # Errors
    /// If the watch has ended.
    async fn next(&mut self, changes: &mut Changes) -> Result<(), StoreError> {
        let (changes, revision) = tokio::select! {
            news = changes.desired.next() => news?,
            news = changes.state.next() => news?,
        };
        for change in changes {
            if let Some(key) = change.key {
                self.take(key, change.value);
            }
        }
        self.revision = self.revision.max(revision);
        self.contents.resolve(&self.key);
        Ok(())
    }

    /// The mod revision of a key that people write; 0 if there is none.
    fn modified(&self, key: &Key) -> i64 {
        self.contents.entry(key).map_or(0, Entry::modified)
    }

    fn text(&self, key: &Key) -> Option<String> {
        self.contents.entry(key).map(|entry| String::from_utf8_lossy(entry.value()).trim().to_owned())
    }

    /// An app that can be deployed.
    ///
    /// # Errors
    /// If it does not exist, or its keys are wrong.
    fn app(&self, app: &AppName) -> Result<&Everywhere, Failed> {
        match self.contents.apps().get(app) {
            None => Err(no_app(app)),
            Some(Err(problems)) => Err(Failed::because(format!("`{app}` is invalid:\n{problems}"))),
            Some(Ok(everywhere)) => Ok(everywhere),
        }
    }

    /// What people want of an app.
    fn wanted(&self, app: &AppName) -> Wanted {
        let pin = match self.contents.pin(app) {
            Ok(pin) => pin,
            Err(e) => return Wanted::Stopped(format!("`{}` names no release: {e}", Key::Pin(app.clone()))),
        };
        match self.contents.apps().get(app) {
            None => Wanted::Nothing,
            Some(Err(problems)) => Wanted::Stopped(format!("its keys are invalid: {problems}")),
            Some(Ok(everywhere)) => match &everywhere.paused {
                Some(reason) => {
                    let reason = reason.trim();
                    let reason = if reason.is_empty() { "no reason given" } else { reason };
                    Wanted::Stopped(format!("a person paused it: {reason}"))
                }
                None => Wanted::Release(pin.unwrap_or_else(|| everywhere.target.release.id.clone())),
            },
        }
    }

    /// Whether a rollout is to be opened for a release that is about to be wanted. A change that makes no release opens none,
    /// nor does one that repairs an invalid spec and leads to the release that runs.
    fn opens_rollout(&self, app: &AppName, release: &ReleaseId) -> bool {
        match self.wanted(app) {
            Wanted::Release(now) => now != *release,
            Wanted::Nothing => true,
            Wanted::Stopped(_) => {
                let rollout = self.contents.records.rollouts.get(app).and_then(|stored| stored.value.as_ref());
                rollout.is_none_or(|rollout| rollout.release != *release)
            }
        }
    }

    /// What became of a release; failures from before the revision `since` do not count.
    fn outcome(&self, app: &AppName, release: &ReleaseId, since: i64, until: Until) -> Outcome {
        let none = BTreeMap::new();
        outcome(&Question {
            app,
            release,
            since,
            spec: self.modified(&Key::Spec(app.clone())),
            until,
            wanted: &self.wanted(app),
            hosts: &self.hosts(app),
            records: &self.contents.records,
            statuses: self.statuses.get(app).unwrap_or(&none),
            frozen: self.text(&Key::Freeze).as_deref(),
        })
    }

    /// Hosts that are up and are to run an app, and whether each takes turns.
    fn hosts(&self, app: &AppName) -> BTreeMap<HostName, bool> {
        let Some(Ok(everywhere)) = self.contents.apps().get(app) else { return BTreeMap::new() };
        let hosts = self.contents.hosts.iter();
        let hosts = hosts.filter(|(host, info)| self.contents.is_placed(app, everywhere, host, info));
        hosts.map(|(host, info)| (host.clone(), takes_turns(info))).collect()
    }

    /// Whether an edit is in the store, given the revision of before it.
    fn shows(&self, edit: &Edit, before: i64) -> Option<i64> {
        let put = |(key, value): &(Key, Vec<u8>)| {
            let entry = self.contents.entry(key).filter(|entry| entry.value() == value && entry.modified() > before)?;
            Some(entry.modified())
        };
        let gone = edit.deletes.iter().all(|key| self.contents.entry(key).is_none());
        let revisions: Option<Vec<i64>> = edit.puts.iter().map(put).collect();
        // What is deleted was there, and has no revision any more.
        revisions.filter(|_| gone).map(|found| found.into_iter().max().unwrap_or(self.revision))
    }

    /// A key of an edit that another client has written since.
    fn overwritten<'e>(&self, edit: &'e Edit, before: i64) -> Option<&'e Key> {
        edit.puts.iter().map(|(key, _)| key).chain(&edit.deletes).find(|key| self.modified(key) > before)
    }
}

/// The release that an app is pinned to, if it is, and what machines wrote.
///
/// # Errors
/// If the store cannot be read, or the pin names no release.
pub(super) async fn pin_and_records(
    config: &EtcdConfig,
    app: &AppName,
) -> Result<(Option<ReleaseId>, Records), Failed> {
    let contents = Fleet::read(config).await?.contents;
    let bad = |e| Failed::because(format!("`{}` names no release: {e}", Key::Pin(app.clone())));
    Ok((contents.pin(app).map_err(bad)?, contents.records))
}

fn no_app(app: &AppName) -> Failed {
    Failed::because(format!(
        "no app `{app}` is in the store (put its spec to `apps/{app}/spec`, or deploy it with `--spec FILE`)"
    ))
}

/// The flags of a verb that changes an app and waits.
#[derive(Debug, clap::Args)]
struct ChangeArgs {
    /// The app
    #[arg(value_name = "APP", index = 1)]
    app: String,
    /// Why, for `demae history`
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    #[command(flatten)]
    wait: wait::WaitArgs,
    #[command(flatten)]
    store: StoreArgs,
}

impl ChangeArgs {
    /// Decides, writes, and waits.
    fn run(&self, printer: &mut Printer, decide: impl Fn(&Fleet, &AppName) -> Result<Decision, Failed>) -> Ended {
        self.wait.check()?;
        let config = self.store.etcd_to_write(printer)?;
        let app = AppName::try_from(self.app.as_str())?;
        runtime(1)?.block_on(async {
            let by = author::signature(self.message.as_deref());
            let written = write(&config, Some((&app, &by)), |fleet| decide(fleet, &app)).await?;
            if let Some(note) = written.note.as_ref().filter(|_| written.revision > 0) {
                printer.error(&format!("note: {note}"));
            }
            wait::follow(&config, &app, written, &self.wait, printer).await
        })
    }
}

/// A change that was written.
struct Written {
    /// Its revision; 0 if there was nothing to write.
    revision: i64,
    /// The revision before which failures do not count; 0 if all do.
    since: i64,
    /// The release to wait for.
    release: ReleaseId,
    /// What else is to be said.
    note: Option<String>,
}

/// What a verb decides to write: the edit, and the release to wait for. Nothing is written if the edit is empty.
struct Decision {
    edit: Edit,
    release: ReleaseId,
    /// Whether what became of the release can only be known after the edit.
    waits_for_edit: bool,
    /// What else is to be said once it is written.
    note: Option<String>,
}

impl Decision {
    fn new(edit: Edit, release: ReleaseId, waits_for_edit: bool) -> Self {
        Self { edit, release, waits_for_edit, note: None }
    }

    fn with_note(self, note: String) -> Self {
        Self { note: Some(note), ..self }
    }
}

/// The same edit, and who it is from, if it changes what a release is made from.
fn signed(mut edit: Edit, by: Option<(&AppName, &str)>) -> Edit {
    let makes_release = |key: &Key| matches!(key, Key::Spec(_) | Key::Image(_) | Key::Restart(_) | Key::Env(..));
    let is_signed = edit.puts.iter().map(|(key, _)| key).chain(&edit.deletes).any(makes_release);
    if let Some((app, by)) = by.filter(|_| is_signed) {
        edit.puts.push((Key::By(app.clone()), by.as_bytes().to_vec()));
    }
    edit
}

/// Decides by what the store says, and writes it. Returns the revision, 0 if there was nothing to write, and what else was
/// decided. An answer that was lost is looked for in the store, so that nothing is written twice and nothing that was
/// written is denied.
///
/// `by` says who changes which app. It is left out where the rights of this user do not suffice for it.
async fn commit<T>(
    config: &EtcdConfig,
    mut by: Option<(&AppName, &str)>,
    decide: impl Fn(&Fleet) -> Result<(Edit, T), Failed>,
) -> Result<(i64, T), Failed> {
    let mut unknown: Option<(Edit, T, i64, StoreError)> = None;
    for _ in 0..TRIES {
        let fleet = match (Fleet::read(config).await, &unknown) {
            (Ok(fleet), _) => fleet,
            (Err(failed), None) => return Err(failed),
            (Err(_), Some((.., e))) => return Err(Failed::undecided(lost_answer(e))),
        };
        if let Some((edit, decided, before, _)) = unknown.take() {
            if let Some(revision) = fleet.shows(&edit, before) {
                return Ok((revision, decided));
            }
            if let Some(key) = fleet.overwritten(&edit, before) {
                return Err(Failed::superseded(format!(
                    "the answer to the write was lost, and `{key}` was written by another client since"
                )));
            }
        }
        let (edit, decided) = decide(&fleet)?;
        if edit.is_empty() {
            return Ok((0, decided));
        }
        let edit = signed(edit, by);
        match fleet.session.edit(&edit).await {
            Ok(Some(revision)) => return Ok((revision, decided)),
            // Another change came between: it is decided by what the store says now.
            Ok(None) => {}
            Err(e) if e.is_of_rights() && by.is_some() => by = None,
            Err(e) if e.is_of_rights() => {
                return Err(Failed::because(format!("nothing was written: {e} (docs/keys.md has the rights)")));
            }
            Err(e) if e.is_refusal() => return Err(Failed::because(format!("nothing was written: {e}"))),
            Err(e) => unknown = Some((edit, decided, fleet.revision, e)),
        }
    }
    match unknown {
        Some((.., e)) => Err(Failed::undecided(lost_answer(&e))),
        None => Err(Failed::superseded("other changes are written to the same keys all the time; nothing was written")),
    }
}

/// Decides on a release, and writes it.
async fn write(
    config: &EtcdConfig,
    by: Option<(&AppName, &str)>,
    decide: impl Fn(&Fleet) -> Result<Decision, Failed>,
) -> Result<Written, Failed> {
    let decide = |fleet: &Fleet| {
        let Decision { edit, release, waits_for_edit, note } = decide(fleet)?;
        Ok((edit, (release, waits_for_edit, note)))
    };
    let (revision, (release, waits_for_edit, note)) = commit(config, by, decide).await?;
    Ok(Written { revision, since: if waits_for_edit { revision } else { 0 }, release, note })
}

/// Makes an edit that no release follows from. Returns its revision; `None` if there was nothing to write.
fn write_alone(
    store: &StoreArgs,
    printer: &mut Printer,
    decide: impl Fn(&Fleet) -> Result<Edit, Failed>,
) -> Result<Option<i64>, Failed> {
    let config = store.etcd_to_write(printer)?;
    let (revision, ()) = runtime(1)?.block_on(commit(&config, None, |fleet| Ok((decide(fleet)?, ()))))?;
    Ok(Some(revision).filter(|revision| *revision > 0))
}

fn lost_answer(e: &StoreError) -> String {
    format!("it is not known whether the change was written: {e}")
}

/// A pause that ends at a time, if there is one.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
