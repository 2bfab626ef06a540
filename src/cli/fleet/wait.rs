//! `demae wait`, and the wait of every verb that changes an app.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Fleet, StoreArgs, Written,
    attempts::{Waited, attempts},
    no_app, progress,
    report::{Report, conclude},
    until,
};
use crate::{
    cli::{Ended, Exit, Failed, Format, print::Printer, runtime},
    fleet::outcome::{Outcome, Until, Wanted},
    model::{
        name::{AppName, ReleaseId},
        text,
    },
    store::client::EtcdConfig,
};

/// How long something must keep a release back before a person is said to be needed: conflicts may pass by themselves.
const SETTLED: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// The release; unless given, the one that is wanted now
    #[arg(long, value_name = "RELEASE")]
    release: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// How a change is waited for.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Waiting")]
pub(super) struct WaitArgs {
    /// Longest wait
    #[arg(long, value_name = "DURATION", default_value = "15m")]
    timeout: String,
    /// Do not wait
    #[arg(long)]
    pub(super) detach: bool,
    /// What is waited for
    #[arg(long, value_enum, default_value = "converged")]
    until: Goal,
    /// What is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    /// How the progress is printed, on standard error
    #[arg(long, value_enum, default_value = "auto", value_name = "FORM")]
    progress: progress::Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Goal {
    /// Every host has proven the release
    Converged,
    /// Every host answers with it
    Serving,
    /// Proven on the canaries is enough
    Canary,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = args.store.etcd()?;
    let app = AppName::try_from(args.app.as_str())?;
    args.wait.check()?;
    runtime(1)?.block_on(async {
        let release = match &args.release {
            Some(text) => ReleaseId::try_from(text.as_str())?,
            None => {
                let fleet = Fleet::read(&config).await?;
                match fleet.wanted(&app) {
                    Wanted::Release(release) => release,
                    Wanted::Nothing => return Err(no_app(&app)),
                    Wanted::Stopped(why) => return Err(Failed::blocked(format!("{app}: {why}"))),
                }
            }
        };
        follow(&config, &app, Written { revision: 0, since: 0, release, note: None }, &args.wait, printer).await
    })
}

impl WaitArgs {
    /// Checks the flags, before anything is written.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(super) fn check(&self) -> Result<(), Failed> {
        self.timeout().map(|_| ())
    }

    fn timeout(&self) -> Result<Duration, Failed> {
        text::duration(&self.timeout).map_err(|e| Failed::usage(format!("--timeout: {e}")))
    }

    /// When a wait that begins now is over.
    ///
    /// # Errors
    /// If the flag is wrong.
    pub(super) fn deadline(&self) -> Result<Instant, Failed> {
        Ok(Instant::now() + self.timeout()?)
    }

    fn goal(&self) -> Until {
        match self.until {
            Goal::Converged => Until::Converged,
            Goal::Serving => Until::Serving,
            Goal::Canary => Until::Canary,
        }
    }

    pub(super) fn format(&self) -> Format {
        self.output
    }
}

/// Waits until it is decided what became of a release, and says it.
///
/// # Errors
/// If the flags are wrong. The store is asked again until the time is over.
pub(super) async fn follow(
    config: &EtcdConfig,
    app: &AppName,
    written: Written,
    args: &WaitArgs,
    printer: &mut Printer,
) -> Ended {
    follow_until(config, app, written, args, args.deadline()?, printer).await
}

/// The same, with a deadline that several waits share.
///
/// # Errors
/// If the flags are wrong. The store is asked again until the time is over.
pub(super) async fn follow_until(
    config: &EtcdConfig,
    app: &AppName,
    written: Written,
    args: &WaitArgs,
    deadline: Instant,
    printer: &mut Printer,
) -> Ended {
    let Written { revision, since, release, .. } = written;
    let mut report = Report::new(app.clone(), release.clone(), revision, args.format(), args.progress);
    if args.detach {
        report.detached(printer);
        return Ok(Exit::Success);
    }
    let mut watcher = Watcher { goal: args.goal(), blocked_since: None };
    let ended = attempts(deadline, async |turn| {
        match watcher.watch(config, turn, app, (&release, since), &mut report, printer).await {
            Ok(ended) => Some(ended),
            Err(failed) => {
                report.progress.note(printer, &format!("the store cannot be read now: {}", failed.message));
                None
            }
        }
    });
    match ended.await? {
        Waited::Done((outcome, fleet)) => Ok(conclude(&report, &outcome, &fleet, watcher.goal, printer)),
        Waited::TimedOut => {
            report.goes_on(printer, &format!("not decided within {}", args.timeout));
            Ok(Exit::Undecided)
        }
        Waited::Interrupted => {
            report.goes_on(printer, "stopped waiting");
            Ok(Exit::Interrupted)
        }
    }
}

struct Watcher {
    goal: Until,
    blocked_since: Option<(String, Instant)>,
}

impl Watcher {
    /// Watches one connection until the answer is decided.
    async fn watch(
        &mut self,
        config: &EtcdConfig,
        turn: usize,
        app: &AppName,
        (release, since): (&ReleaseId, i64),
        report: &mut Report,
        printer: &mut Printer,
    ) -> Result<(Outcome, Fleet), Failed> {
        let failed = |e: crate::store::StoreError| Failed::try_later(e.to_string());
        let mut fleet = Fleet::read_from(config, turn).await.map_err(failed)??;
        let mut changes = fleet.changes().await.map_err(failed)?;
        loop {
            let decided = fleet.outcome(app, release, since, self.goal);
            report.show(&fleet, &decided, printer);
            let settles = match &decided {
                Outcome::Pending(_) => {
                    self.blocked_since = None;
                    None
                }
                Outcome::Blocked(_, why) => {
                    let same = self.blocked_since.take().filter(|(known, _)| known == why);
                    let (why, since) = same.unwrap_or_else(|| (why.clone(), Instant::now()));
                    let settles = since + SETTLED;
                    self.blocked_since = Some((why, since));
                    if settles <= Instant::now() {
                        return Ok((decided, fleet));
                    }
                    Some(settles)
                }
                _ => return Ok((decided, fleet)),
            };
            tokio::select! {
                news = fleet.next(&mut changes) => news.map_err(failed)?,
                () = until(settles) => {}
            }
        }
    }
}
