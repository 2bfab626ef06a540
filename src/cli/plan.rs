//! `demae plan`

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    Common, Ended, Exit, Failed,
    print::Printer,
    runtime,
    setup::{self, Disk},
};
use crate::{
    config::Config,
    host::docker::NoMeter,
    model::{
        desired::DesiredApp,
        fleet::FleetImage,
        mounts,
        name::AppName,
        observed::{ObservedApp, Wanted},
        time::Timestamp,
    },
    plan::{
        AppInput, Backoffs, FREE, NONE_STOPPING, ProxyView,
        app::plan_app,
        proxy::conflicts,
        simulate::{SimHost, forecast},
    },
    store,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only these apps
    #[arg(value_name = "APP")]
    apps: Vec<String>,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = Config::load(&args.common)?;
    let only = args.apps.iter().map(|a| AppName::try_from(a.as_str())).collect::<Result<BTreeSet<_>, _>>()?;
    runtime(1)?.block_on(plan(&config, &only, printer))
}

async fn plan(config: &Config, only: &BTreeSet<AppName>, printer: &mut Printer) -> Ended {
    let world = setup::world(config, None, Arc::new(NoMeter))?;
    // As an agent would: with its own release key, and checked against its ledger.
    let viewer = setup::viewer(config, &world).await?;
    let compared = store::compare(&config.etcd, &viewer, &Disk(world.layout.clone())).await;
    let compared = compared.map_err(|e| Failed::try_later(e.to_string()))?;
    if let Some(block) = compared.block {
        printer.error(&format!(
            "note: the store is not trusted; this is the plan for the last accepted state: {} ({})",
            block.message, block.remedy
        ));
    }
    let snapshot = compared.acting;
    let proxy = world.nginx.observe().await;
    let mut apps: BTreeSet<AppName> = world.docker.list(None).await?.into_iter().map(|l| l.app).collect();
    apps.extend(world.apps_on_disk()?);
    apps.extend(snapshot.apps.keys().cloned());
    apps.retain(|a| only.is_empty() || only.contains(a));
    let conflicts = conflicts(&snapshot, &proxy);
    let policy = world.docker.policy();
    let mut changes = false;
    for problem in &snapshot.unreadable {
        printer.line(&format!("{problem}"));
    }
    if let Some(error) = &proxy.error {
        printer.error(&format!("note: {error}"));
    }
    if let Some(missing) = only.iter().find(|app| !apps.contains(*app)) {
        return Err(Failed::because(format!("no app `{missing}` is here, and none is wanted here")));
    }
    let why = "the store has no such app".to_owned();
    let unwanted = if snapshot.proven { DesiredApp::Absent(why) } else { DesiredApp::Unknown(why) };
    // As the agent has last left it: a look would change this host.
    let has_table = world.tcp_routes.is_ready();
    let mut all = BTreeMap::new();
    for app in &apps {
        let desired = snapshot.apps.get(app).unwrap_or(&unwanted);
        let wanted = match desired {
            DesiredApp::Run(target) => {
                let (release, image) = (target.release.id.clone(), target.release.image.clone());
                Some(Wanted { release, image, digest: None, image_lost: false, slots: target.table_slots() })
            }
            _ => None,
        };
        all.insert(app.clone(), world.observe_app(app, wanted.as_ref(), None).await?);
    }
    let binds = |observed: &ObservedApp| observed.instances.iter().flat_map(|i| i.binds.clone()).collect();
    let present = all.iter().map(|(app, observed)| (app.clone(), binds(observed))).collect();
    let nested = mounts::nested(&snapshot, &present);
    let mut plans = BTreeMap::new();
    for (app, observed) in &all {
        let desired = snapshot.apps.get(app).unwrap_or(&unwanted);
        let now = Timestamp::now();
        let backoffs = Backoffs::new();
        let input = AppInput {
            app,
            desired,
            turn: &FREE,
            image: &FleetImage::AsNamed,
            observed,
            proxy: ProxyView {
                live: proxy.vhost(app),
                rejected: proxy.rejected(app),
                serving: true,
                // A verdict through nginx holds as long as the templates are the same.
                templates: &proxy.templates,
                ..ProxyView::default()
            },
            conflict: conflicts.get(app).cloned(),
            backoffs: &backoffs,
            nested: nested.get(app),
            policy: &policy,
            stays_until: None,
            busy: None,
            stopping: &NONE_STOPPING,
            now,
        };
        let blocks = plan_app(&input).blocks;
        let lines = if blocks.is_empty() {
            let host = SimHost::new(app.clone(), observed.clone(), proxy.vhost(app).cloned(), now);
            let host = if has_table { host.with_table() } else { host };
            forecast(host, desired)
        } else {
            Vec::new()
        };
        plans.insert(app, (blocks, lines));
    }
    for (app, (blocks, lines)) in &plans {
        for block in blocks {
            printer.line(&format!("{app}: blocked: {block} ({})", block.remedy(app)));
        }
        if lines.is_empty() && blocks.is_empty() {
            printer.line(&format!("{app}: nothing to do"));
        }
        for (number, line) in lines.iter().enumerate() {
            changes = true;
            printer.line(&format!("{app}: {}. {line}", number + 1));
        }
    }
    if plans.is_empty() {
        printer.error("no app is wanted here, and none is here");
    }
    Ok(if changes { Exit::Changes } else { Exit::Success })
}
