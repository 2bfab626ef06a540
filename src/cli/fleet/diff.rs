//! `demae diff`

use std::collections::{BTreeMap, BTreeSet};

use similar::TextDiff;

use super::{Fleet, StoreArgs};
use crate::{
    cli::{Ended, Exit, Failed, print::Printer, runtime},
    model::{
        fleet::{FleetKey, KeptEnv, KeptRelease},
        name::{AppName, EnvName, ReleaseId, SetName},
        release::ReleaseKey,
    },
    store::MadeFrom,
};

/// Lines that are shown around a change.
const CONTEXT: usize = 3;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// A kept release; unless given, the last one that was proven before the other one
    #[arg(value_name = "FROM")]
    from: Option<String>,
    /// A kept release; unless given, the wanted one
    #[arg(value_name = "TO")]
    to: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
}

/// What a release is made from.
pub(super) struct Made {
    name: String,
    spec: String,
    image: Option<String>,
    restart: Option<String>,
    env: BTreeMap<SetName, BTreeMap<EnvName, String>>,
}

impl Made {
    /// For the texts of a release with this name.
    pub(super) fn new(name: String, made: MadeFrom) -> Self {
        Self { name, spec: made.spec, image: made.image, restart: made.restart, env: made.env }
    }
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = args.store.etcd()?;
    let app = AppName::try_from(args.app.as_str())?;
    let [from, to] = [&args.from, &args.to].map(|given| given.as_deref().map(ReleaseId::try_from).transpose());
    let (from, to) = (from?, to?);
    let (key, from, to) = runtime(1)?.block_on(async {
        let fleet = Fleet::read(&config).await?;
        let to = match &to {
            Some(release) => kept(&fleet, &app, release).await?,
            None => wanted(&fleet, &app)?,
        };
        let from = match from {
            Some(release) => release,
            None => before(&fleet, &app, &to.name)?,
        };
        let from = kept(&fleet, &app, &from).await?;
        Ok::<_, Failed>((fleet.key, from, to))
    })?;
    let lines = compare(&app, &from, &to, &key);
    for line in &lines {
        printer.line(line);
    }
    if lines.is_empty() {
        printer.error(&format!("{} and {} are made from the same", from.name, to.name));
    }
    Ok(if lines.is_empty() { Exit::Success } else { Exit::Changes })
}

fn wanted(fleet: &Fleet, app: &AppName) -> Result<Made, Failed> {
    let everywhere = fleet.app(app)?;
    Ok(Made::new(everywhere.target.release.id.to_string(), everywhere.made_from.clone()))
}

async fn kept(fleet: &Fleet, app: &AppName, release: &ReleaseId) -> Result<Made, Failed> {
    let read = async |key: FleetKey| fleet.session.get(&key).await.map_err(|e| Failed::try_later(e.to_string()));
    let text = read(FleetKey::Kept(app.clone(), release.clone())).await?;
    let env = read(FleetKey::KeptEnv(app.clone(), release.clone())).await?;
    let gone =
        || Failed::because(format!("{release} is no release of {app} that is kept (`demae history {app}` lists them)"));
    let kept: KeptRelease = serde_json::from_slice(&text.ok_or_else(gone)?)?;
    let env: KeptEnv = serde_json::from_slice(&env.ok_or_else(gone)?)?;
    Ok(Made { name: release.to_string(), spec: kept.spec, image: kept.image, restart: kept.restart, env: env.sets })
}

/// The last release that was proven, and is another one.
fn before(fleet: &Fleet, app: &AppName, other: &str) -> Result<ReleaseId, Failed> {
    let kept = fleet.contents.records.kept.iter().filter(|((of, release), _)| of == app && release.as_str() != other);
    let proven = kept.filter_map(|((_, release), stored)| Some((release, stored.value.as_ref()?.proven?)));
    let last = proven.max_by_key(|(_, proven)| *proven).map(|(release, _)| release.clone());
    last.ok_or_else(|| Failed::because(format!("no release of {app} before {other} is kept")))
}

/// The differences, line by line; none if there are none. Of variables their names, sizes and digests.
pub(super) fn compare(app: &AppName, from: &Made, to: &Made, key: &ReleaseKey) -> Vec<String> {
    let mut lines = Vec::new();
    let image = |made: &Made| made.image.as_deref().map_or("of the spec", str::trim).to_owned();
    if image(from) != image(to) {
        lines.push(format!("- image: {}", image(from)));
        lines.push(format!("+ image: {}", image(to)));
    }
    if from.restart != to.restart {
        lines.push(format!("+ redeployed: {}", to.restart.as_deref().unwrap_or("not any more").trim()));
    }
    let sets: BTreeSet<&SetName> = from.env.keys().chain(to.env.keys()).collect();
    for set in sets {
        let none = BTreeMap::new();
        let (before, after) = (from.env.get(set).unwrap_or(&none), to.env.get(set).unwrap_or(&none));
        let names: BTreeSet<&EnvName> = before.keys().chain(after.keys()).collect();
        for name in names {
            let (old, new) = (before.get(name), after.get(name));
            if old == new {
                continue;
            }
            let say = |sign: char, value: &String| {
                format!("{sign} env/{set}/{name} ({} bytes, {})", value.len(), key.digest(name, value))
            };
            lines.extend(old.map(|value| say('-', value)));
            lines.extend(new.map(|value| say('+', value)));
        }
    }
    if from.spec != to.spec {
        let diff = TextDiff::from_lines(&from.spec, &to.spec);
        let names = [&from.name, &to.name].map(|name| format!("apps/{app}/spec of {name}"));
        let text = diff.unified_diff().context_radius(CONTEXT).header(&names[0], &names[1]).to_string();
        lines.extend(text.lines().map(str::to_owned));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(name: &str, spec: &str, image: &str, env: &[(&str, &str)]) -> Made {
        let set = SetName::try_from("web").expect("a name");
        let values = env.iter().map(|(k, v)| (EnvName::try_from(*k).expect("a name"), (*v).to_owned())).collect();
        let (spec, image, env) = (spec.to_owned(), Some(image.to_owned()), BTreeMap::from([(set, values)]));
        Made { name: name.to_owned(), spec, image, restart: None, env }
    }

    #[test]
    fn differences_name_variables_and_hide_their_values() {
        let app = AppName::try_from("web").expect("a name");
        let from = made("a", "image: x\nreplicas: 1\n", "web:v1", &[("KEY", "hidden"), ("OLD", "hidden")]);
        let to = made("b", "image: x\nreplicas: 2\n", "web:v2", &[("KEY", "other"), ("NEW", "hidden")]);
        let lines = compare(&app, &from, &to, &ReleaseKey::new("k"));
        let signs: String = lines.iter().filter_map(|line| line.chars().next()).collect();
        assert_eq!(signs, "-+-++--+@ -+", "{lines:#?}");
        assert!(!lines.iter().any(|line| line.contains("hidden") || line.contains("other")), "{lines:#?}");
        assert!(lines.iter().any(|line| line.starts_with("- env/web/OLD (6 bytes, ")), "{lines:#?}");
        assert!(compare(&app, &from, &from, &ReleaseKey::new("k")).is_empty());
    }
}
