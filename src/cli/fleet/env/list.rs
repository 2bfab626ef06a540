//! `demae env list`

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Fleet, StoreArgs, no_app};
use crate::{
    cli::{Ended, Exit, Failed, Format, print::Printer, runtime},
    model::{
        env::Secret,
        fleet::{FleetKey, KeptEnv},
        name::{AppName, EnvName, HostName, ReleaseId, SetName},
        status::VERSION,
    },
    store::Everywhere,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// Print the values, too
    #[arg(long)]
    values: bool,
    /// What is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    #[command(flatten)]
    store: StoreArgs,
}

/// One variable in the JSON output.
#[derive(Debug, Serialize)]
struct Shown {
    name: EnvName,
    /// `env/<set>/`, or `spec`.
    from: String,
    bytes: usize,
    /// Tells values apart, and says nothing about them.
    digest: String,
    /// Hosts on which a release with this value serves.
    deployed: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
}

#[derive(Debug, Serialize)]
struct ShownAll {
    version: u32,
    app: AppName,
    hosts: usize,
    variables: Vec<Shown>,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = args.store.etcd()?;
    let app = AppName::try_from(args.app.as_str())?;
    let (shown, unread) = runtime(1)?.block_on(async {
        let fleet = Fleet::read(&config).await?;
        if !fleet.contents.apps().contains_key(&app) {
            return Err(no_app(&app));
        }
        let (served, unread) = served(&fleet, &app).await;
        let variables = variables(&fleet, &app, args.values, &served)?;
        Ok((ShownAll { version: VERSION, hosts: fleet.hosts(&app).len(), variables, app: app.clone() }, unread))
    })?;
    if args.output == Format::Json {
        printer.line(&serde_json::to_string_pretty(&shown)?);
        return Ok(Exit::Success);
    }
    let mut head = vec!["NAME", "DIGEST", "BYTES", "FROM", "DEPLOYED"];
    head.extend(args.values.then_some("VALUE"));
    let mut rows = vec![head.into_iter().map(String::from).collect::<Vec<_>>()];
    for variable in &shown.variables {
        let deployed = match variable.deployed {
            0 if shown.hosts > 0 => "staged".to_owned(),
            count => format!("{count}/{}", shown.hosts),
        };
        let mut row = vec![
            variable.name.to_string(),
            variable.digest.clone(),
            variable.bytes.to_string(),
            variable.from.clone(),
            deployed,
        ];
        row.extend(variable.value.as_ref().map(|value| value.escape_debug().to_string()));
        rows.push(row);
    }
    printer.table(&rows);
    if let Some(why) = unread {
        printer.error(&format!("note: what earlier releases were made from cannot be read: {why}"));
    }
    Ok(Exit::Success)
}

/// What a host serves: the wanted release, or the variables of another one, if they are kept.
enum Served {
    Wanted,
    Kept(KeptEnv),
}

/// What each host serves, and why some of it cannot be read.
async fn served(fleet: &Fleet, app: &AppName) -> (BTreeMap<HostName, Served>, Option<String>) {
    let Some(Ok(everywhere)) = fleet.contents.apps().get(app) else { return (BTreeMap::new(), None) };
    let wanted = everywhere.target.release.id.as_str();
    let (mut served, mut unread) = (BTreeMap::new(), None);
    let hosts = fleet.hosts(app);
    let statuses = fleet.statuses.get(app).into_iter().flatten().filter(|(host, _)| hosts.contains_key(*host));
    for (host, (status, _)) in statuses {
        let Some(release) = status.serves() else { continue };
        if release == wanted {
            served.insert(host.clone(), Served::Wanted);
            continue;
        }
        let Ok(release) = ReleaseId::try_from(release) else { continue };
        match fleet.session.get(&FleetKey::KeptEnv(app.clone(), release)).await {
            Ok(kept) => {
                let kept = kept.and_then(|text| serde_json::from_slice(&text).ok());
                served.extend(kept.map(|kept| (host.clone(), Served::Kept(kept))));
            }
            Err(e) => unread = Some(e.to_string()),
        }
    }
    (served, unread)
}

/// The variables of an app as the next release has them.
fn variables(
    fleet: &Fleet,
    name: &AppName,
    values: bool,
    served: &BTreeMap<HostName, Served>,
) -> Result<Vec<Shown>, Failed> {
    let (app, own) = (fleet.app(name)?, SetName::try_from(name.as_str()).ok());
    let one = |(name, value): (&EnvName, &Secret)| {
        let value = value.expose();
        let set = from(app, own.as_ref(), name, value);
        let has_it = |served: &&Served| match (served, set) {
            (Served::Wanted, _) => true,
            (Served::Kept(kept), Some(set)) => {
                kept.sets.get(set).and_then(|set| set.get(name)).is_some_and(|v| v == value)
            }
            // The spec of that time is another text; that of now is not deployed there.
            (Served::Kept(_), None) => false,
        };
        Shown {
            name: name.clone(),
            from: set.map_or_else(|| "spec".to_owned(), |set| format!("env/{set}/")),
            bytes: value.len(),
            digest: fleet.key.digest(name, value),
            deployed: served.values().filter(has_it).count(),
            value: values.then(|| value.to_owned()),
        }
    };
    Ok(app.target.release.env.iter().map(one).collect())
}

/// The set that a value comes from; `None` for the spec. The app's own set wins, then the spec, then the last set of
/// `env_from`.
fn from<'a>(app: &'a Everywhere, own: Option<&SetName>, name: &EnvName, value: &str) -> Option<&'a SetName> {
    let sets = &app.made_from.env;
    let has = |set: &&SetName| sets.get(*set).and_then(|values| values.get(name)).is_some_and(|found| found == value);
    let first = sets.keys().find(|set| Some(*set) == own).filter(has);
    first.or_else(|| sets.keys().filter(|set| Some(*set) != own).find(has))
}
