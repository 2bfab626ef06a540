//! `demae images`

use std::{sync::Arc, time::Duration};

use serde::Serialize;

use super::{Common, Ended, Exit, Failed, Format, agent_address, print::Printer, runtime, setup};
use crate::{
    config::Config,
    host::{docker::NoMeter, images::Listed, probe},
    model::{
        name::AppName,
        status::{HostStatus, VERSION},
        time::{Timestamp, human},
    },
};

/// Timeout of the question what apps want.
const TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Address of the agent; its metrics URL will do
    #[arg(long, env = "DEMAE_METRICS", value_name = "URL")]
    agent: Option<String>,
    /// What is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    /// Only images of this app
    #[arg(value_name = "APP")]
    app: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// The JSON output.
#[derive(Debug, Serialize)]
struct ShownAll {
    version: u32,
    images: Vec<Shown>,
}

#[derive(Debug, Serialize)]
struct Shown {
    image: String,
    id: String,
    apps: Vec<AppName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<i64>,
    pulled: Timestamp,
    used: Timestamp,
    /// Why it stays; without it, it is removed once the disk is full.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<String>,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = Config::load(&args.common)?;
    let app = args.app.as_deref().map(AppName::try_from).transpose()?;
    let world = setup::world(&config, None, Arc::new(NoMeter))?;
    let address = agent_address(args.agent.as_deref())?;
    let listed = runtime(1)?.block_on(async {
        let away = |why: String| {
            Failed::try_later(format!(
                "no agent answers at {address} ({why}), and it alone knows what the apps of this host want"
            ))
        };
        let answer = probe::get_tcp(&address, "localhost", "/status", TIMEOUT).await.map_err(away)?;
        let status: HostStatus = serde_json::from_str(&answer.body).map_err(|e| away(e.to_string()))?;
        world.images.list(&status).await.map_err(Failed::try_later)
    })?;
    let is_chosen = |listed: &Listed| app.as_ref().is_none_or(|app: &AppName| listed.image.apps.contains_key(app));
    let images: Vec<Shown> = listed.into_iter().filter(is_chosen).map(shown).collect();
    if let Some(app) = app.filter(|_| images.is_empty()) {
        return Err(Failed::because(format!("the agent of this host has pulled no image for `{app}`")));
    }
    if args.output == Format::Json {
        printer.line(&serde_json::to_string_pretty(&ShownAll { version: VERSION, images })?);
        return Ok(Exit::Success);
    }
    let now = Timestamp::now();
    let mut rows = vec![["IMAGE", "APPS", "SIZE", "USED", "KEPT"].map(String::from).to_vec()];
    for image in images {
        rows.push(vec![
            shortened(&image.image),
            image.apps.iter().map(AppName::as_str).collect::<Vec<_>>().join(","),
            image.bytes.map_or_else(|| "gone".to_owned(), |bytes| format!("{} MB", bytes / 1_000_000)),
            human(now.since(image.used)),
            image.kept.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    printer.table(&rows);
    Ok(Exit::Success)
}

/// With as much of a digest as tells images apart.
fn shortened(image: &str) -> String {
    match image.split_once("@sha256:") {
        Some((name, digest)) => format!("{name}@sha256:{}", digest.get(..12).unwrap_or(digest)),
        None => image.to_owned(),
    }
}

fn shown(listed: Listed) -> Shown {
    let Listed { reference, image, size, reason } = listed;
    Shown {
        image: reference,
        used: image.used(),
        id: image.id,
        apps: image.apps.into_keys().collect(),
        bytes: size,
        pulled: image.pulled,
        kept: reason.map(|reason| reason.to_string()),
    }
}
