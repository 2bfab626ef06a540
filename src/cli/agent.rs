//! `demae agent`

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Common, Ended as CliEnded, Exit, Failed, runtime, setup};
use crate::{
    agent::{Agent, Ended, Options, Outlets},
    config::Config,
    events::Events,
    http::{self, Shown},
    metrics::{Metrics, View, Vitals},
    model::{
        desired::HostMode,
        status::{HostStatus, StoreStatus, VERSION},
    },
    plan::app::plan_app,
    shutdown,
    store::{self, Belief, EtcdCluster, Publishing, Update},
    telemetry, vitals,
    webhook::Webhook,
};

/// Longest wait for the last words to the store.
const GOODBYE: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
    /// Converge and end: 0 when everything is converged, 1 when a person must act
    #[arg(long)]
    once: bool,
    /// With `--once`: give up after this time
    #[arg(long, value_name = "DURATION", default_value = "10m", requires = "once")]
    timeout: String,
}

pub(super) fn run(args: &Args) -> CliEnded {
    let config = Config::load(&args.common)?;
    let timeout = crate::model::text::duration(&args.timeout).map_err(Failed::usage)?;
    let runtime = runtime(2)?;
    let telemetry = {
        // An exporter of spans has a connection, and so belongs to the runtime.
        let _entered = runtime.enter();
        telemetry::start(&config.log).map_err(Failed::because)?
    };
    let ended = runtime.block_on(async {
        let tasks = TaskTracker::new();
        let (orderly, at_once) = shutdown::on_signals(&tasks)?;
        let limit = async {
            if args.once {
                tokio::time::sleep(timeout).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            ended = serve(&config, args.once, orderly) => ended,
            () = at_once.cancelled() => Err(Failed::because("ended at once by a second signal")),
            () = limit => Err(Failed::for_now(format!("not converged after {}; `demae status` tells why", args.timeout))),
        }
    });
    // What it has not exported yet needs the runtime.
    drop(telemetry);
    runtime.shutdown_background();
    Ok(match ended? {
        Ended::Converged | Ended::Told => Exit::Success,
        Ended::Blocked | Ended::Broken => Exit::Failure,
    })
}

/// Runs an agent until the token is cancelled.
pub(super) async fn serve(config: &Config, once: bool, token: CancellationToken) -> Result<Ended, Failed> {
    let _lock = setup::directories(config)?;
    let claim = Arc::new(setup::claim(config)?);
    let (news_out, news) = mpsc::unbounded_channel();
    let metrics = Arc::new(Metrics::new()?);
    let events = Events::new(config.host.clone(), metrics.clone());
    let world = Arc::new(setup::world(config, Some(news_out), metrics.clone())?);
    let empty = HostStatus {
        version: VERSION,
        host: config.host.clone(),
        mode: HostMode::Active,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        store: StoreStatus::default(),
        proxy: None,
        apps: Vec::new(),
        unreadable: Vec::new(),
    };
    let (status, status_in) = watch::channel(empty.clone());
    let (publish, publish_in) = watch::channel((empty, BTreeMap::new()));
    let (view, view_in) =
        watch::channel(Arc::new(View::new(config.host.clone(), config.etcd.prefix.as_str().to_owned())));
    let (vitals, vitals_in) = watch::channel(Vitals::default());
    let (pulse, pulse_in) = watch::channel(tokio::time::Instant::now());
    let (ready, ready_in) = watch::channel(false);
    let (updates, updates_in) = watch::channel(Update::default());

    // The listener and the store outlive the loop by a moment, to tell of its end.
    let (side, tasks) = (CancellationToken::new(), TaskTracker::new());
    let listener = http::bind(config.listen).await.map_err(Failed::because)?;
    let shown = Shown {
        metrics: metrics.clone(),
        view: view_in,
        vitals: vitals_in,
        events: events.clone(),
        status: status_in,
        pulse: pulse_in,
        ready: ready_in,
        end: side.clone(),
    };
    if let Some(webhook) = &config.webhook {
        tasks.spawn(Webhook::new(webhook.clone(), &events, metrics.clone())?.run(side.clone()));
    }
    let serving = http::serve(listener, shown);
    tasks.spawn(async move {
        if let Err(e) = serving.await {
            tracing::error!("metrics, health and status are not served any more: {e}");
        }
    });
    let (viewer, places) = tokio::join!(setup::viewer(config, &world), setup::places(config, &world));
    let viewer = viewer?;
    tasks.spawn(vitals::watch(places, vitals.clone(), side.clone()));
    let shelf = Arc::new(setup::Disk(world.layout.clone()));
    let belief = Belief::new(config.etcd.prefix.clone(), viewer, shelf, updates);
    tasks.spawn(store::watch(EtcdCluster::new(config.etcd.clone(), claim.clone()), belief, side.clone()));
    let doubted = claim.doubted();
    let publishing = Arc::new(Publishing::default());
    let publisher = tasks.spawn(store::publish(
        config.etcd.clone(),
        claim,
        publish_in,
        updates_in.clone(),
        publishing.clone(),
        side.clone(),
    ));
    // An agent that tells nobody anything any more is to be started anew.
    let (mute, told) = (CancellationToken::new(), token.clone());
    let is_mute = mute.clone();
    tasks.spawn(async move {
        if let Err(e) = publisher.await {
            tracing::error!("the publisher of status ended badly, and the agent with it: {e}");
            is_mute.cancel();
            told.cancel();
        }
    });
    tasks.close();
    tracing::info!(host = %config.host, listen = %config.listen, endpoints = config.etcd.endpoints.join(","), "demae {} starts", env!("CARGO_PKG_VERSION"));

    let (resync, parallel, delete_grace) = (config.resync, config.parallel, config.delete_grace);
    let options = Options { resync, parallel, delete_grace, once, planner: plan_app };
    let outlets = Outlets { metrics, view, vitals, events, status, publish, pulse, ready, doubted, publishing };
    let ended = Agent::new(world, options, outlets, updates_in).run(news, token).await;
    side.cancel();
    if tokio::time::timeout(GOODBYE, tasks.wait()).await.is_err() {
        tracing::debug!("the store was not told of the end; the lease tells it");
    }
    tracing::info!("the agent ends; everything it started keeps serving");
    Ok(if mute.is_cancelled() { Ended::Broken } else { ended })
}
