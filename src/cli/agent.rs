//! `demae agent`

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Common, Ended as CliEnded, Exit, Failed, runtime, setup};
use crate::{
    agent::{Agent, Ended, Options, Outlets},
    config::Config,
    events::Events,
    host_gauges,
    http::{self, HttpState},
    metrics::{HostGauges, Metrics, View},
    model::{
        desired::HostMode,
        status::{HostStatus, StoreStatus, VERSION},
    },
    plan::{app::plan_app, proxy::plan_proxy},
    rollout::{self, LeaderOutlets, Link},
    shutdown,
    store::{self, DesiredCache, EtcdCluster, Publishing, SharedFence, Update},
    telemetry,
    webhook::Webhook,
};

/// Timeout of the final status update to the store.
const FINAL_UPDATE_TIMEOUT: Duration = Duration::from_secs(2);

/// Timeout of the question what machine this is.
const CAPACITY_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Exit once converged: 0 when everything is converged, 1 when a person must act
    #[arg(long)]
    once: bool,
    /// With `--once`: give up after this time
    #[arg(long, value_name = "DURATION", default_value = "10m", requires = "once")]
    timeout: String,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args) -> CliEnded {
    let config = Config::load(&args.common)?;
    let timeout = crate::model::text::duration(&args.timeout).map_err(Failed::usage)?;
    let runtime = runtime(2)?;
    let telemetry = {
        // An exporter of spans has a connection, so it must be created within the runtime.
        let _entered = runtime.enter();
        telemetry::start(&config.log).map_err(Failed::because)?
    };
    let ended = runtime.block_on(async {
        let tasks = TaskTracker::new();
        let (graceful, forced) = shutdown::on_signals(&tasks)?;
        let limit = async {
            if args.once {
                tokio::time::sleep(timeout).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            ended = serve(&config, args.once, graceful) => ended,
            () = forced.cancelled() => Err(Failed::because("ended at once by a second signal")),
            () = limit => Err(Failed::try_later(format!("not converged after {}; see `demae status`", args.timeout))),
        }
    });
    // The final export needs the runtime.
    drop(telemetry);
    runtime.shutdown_background();
    Ok(match ended? {
        Ended::Converged | Ended::Shutdown => Exit::Success,
        Ended::Blocked | Ended::TaskPanicked => Exit::Failure,
    })
}

/// Runs an agent until the token is cancelled.
pub(super) async fn serve(config: &Config, once: bool, token: CancellationToken) -> Result<Ended, Failed> {
    let _lock = setup::directories(config)?;
    let claim = Arc::new(setup::claim(config)?);
    let (changes_out, changes) = mpsc::unbounded_channel();
    let metrics = Arc::new(Metrics::new()?);
    let events = Events::new(config.host.clone(), metrics.clone());
    let world = Arc::new(setup::world(config, Some(changes_out.clone()), metrics.clone())?);
    let empty = HostStatus {
        version: VERSION,
        host: config.host.clone(),
        mode: HostMode::Active,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        store: StoreStatus::default(),
        proxy: None,
        tcp_routes: None,
        apps: Vec::new(),
        unreadable: Vec::new(),
    };
    let (status, status_in) = watch::channel(empty.clone());
    let (publish, publish_in) = watch::channel((empty, BTreeMap::new()));
    let (view, view_in) =
        watch::channel(Arc::new(View::new(config.host.clone(), config.etcd.prefix.as_str().to_owned())));
    let (host_gauges, host_gauges_in) = watch::channel(HostGauges::default());
    let (leader_gauges, leader_gauges_in) = watch::channel(None);
    let link = config.rollouts.map(|rollouts| (rollouts, Link::new(claim.owner().run.clone(), rollouts.required)));
    let (_off, off) = watch::channel(false);
    let takes_turns = link.as_ref().map_or(off, |(_, (link, _))| link.takes_turns.clone());
    let (pulse, pulse_in) = watch::channel(tokio::time::Instant::now());
    let (ready, ready_in) = watch::channel(false);
    let (updates, updates_in) = watch::channel(Update::default());

    // The listener and the publisher outlive the loop for a moment, to report its end.
    let (side, tasks) = (CancellationToken::new(), TaskTracker::new());
    let listener = http::bind(config.listen).await.map_err(Failed::because)?;
    let http_state = HttpState {
        metrics: metrics.clone(),
        view: view_in,
        host_gauges: host_gauges_in,
        leader_gauges: leader_gauges_in,
        takes_turns: takes_turns.clone(),
        events: events.clone(),
        status: status_in.clone(),
        pulse: pulse_in,
        ready: ready_in.clone(),
        end: side.clone(),
    };
    if let Some(webhook) = &config.webhook {
        tasks.spawn(Webhook::new(webhook.clone(), &events, metrics.clone())?.run(side.clone()));
    }
    let serving = http::serve(listener, http_state);
    tasks.spawn(async move {
        if let Err(e) = serving.await {
            tracing::error!("the HTTP server for metrics, health and status failed: {e}");
        }
    });
    let (viewer, places) = tokio::join!(setup::viewer(config, &world), setup::places(config, &world));
    let viewer = viewer?;
    tasks.spawn(host_gauges::watch(places, host_gauges.clone(), side.clone()));
    let (kept, end, every) = (world.clone(), side.clone(), config.resync);
    tasks.spawn(async move {
        let nginx = || async { kept.nginx.master().await.ok() };
        // The receiver is gone only when the agent is ending.
        let changed = |app| drop(changes_out.send(app));
        kept.tcp_routes.keep(nginx, changed, every, end).await;
    });
    let (kept, end) = (world.clone(), side.clone());
    let (statuses, is_ready) = (status_in.clone(), ready_in.clone());
    tasks.spawn(async move { kept.images.keep_room(statuses, is_ready, end).await });
    let disk = Arc::new(setup::Disk(world.layout.clone()));
    let fence = Arc::new(SharedFence::default());
    let cache = DesiredCache::new(config.etcd.prefix.clone(), viewer, disk, fence.clone(), updates);
    tasks.spawn(store::watch(EtcdCluster::new(config.etcd.clone(), claim.clone()), cache, side.clone()));
    let resync_requested = claim.resync_requested();
    let publishing = Arc::new(Publishing::default());
    let (leases, leases_in) = watch::channel(None);
    tasks.spawn(store::keep_lease(config.etcd.clone(), updates_in.clone(), leases, side.clone()));
    let link = link.map(|(rollouts, (link, ends))| {
        let (etcd, host) = (config.etcd.clone(), config.host.clone());
        let (updates, leases) = (updates_in.clone(), leases_in.clone());
        let following =
            rollout::follow(etcd.clone(), host.clone(), updates.clone(), leases, ends, metrics.clone(), side.clone());
        tasks.spawn(following);
        if rollouts.may_lead {
            let outlets = LeaderOutlets { metrics: metrics.clone(), gauges: leader_gauges };
            tasks.spawn(rollout::lead(etcd, host, claim.owner().run.clone(), updates, outlets, side.clone()));
        }
        link
    });
    // It is for people: an engine that hangs must not hold up the start for it.
    let capacity = tokio::time::timeout(CAPACITY_TIMEOUT, world.docker.capacity()).await;
    let capacity = capacity.ok().and_then(Result::ok);
    let sources = store::Sources {
        statuses: publish_in,
        leases: leases_in,
        updates: updates_in.clone(),
        fence,
        takes_turns,
        capacity,
    };
    let publisher = tasks.spawn(store::publish(config.etcd.clone(), claim, sources, publishing.clone(), side.clone()));
    // An agent whose publisher died must be restarted.
    let (publisher_died, stop) = (CancellationToken::new(), token.clone());
    let died = publisher_died.clone();
    tasks.spawn(async move {
        if let Err(e) = publisher.await {
            tracing::error!("the publisher of status panicked; the agent exits: {e}");
            died.cancel();
            stop.cancel();
        }
    });
    tasks.close();
    tracing::info!(host = %config.host, listen = %config.listen, endpoints = config.etcd.endpoints.join(","), "demae {} starts", env!("CARGO_PKG_VERSION"));

    let (resync, parallel, delete_grace) = (config.resync, config.parallel, config.delete_grace);
    let options = Options { resync, parallel, delete_grace, once, planner: plan_app, proxy_planner: plan_proxy };
    let outlets =
        Outlets { metrics, view, host_gauges, events, status, publish, pulse, ready, resync_requested, publishing };
    let agent = Agent::new(world, options, outlets, updates_in);
    let agent = match link {
        Some(link) => agent.with_rollouts(link),
        None => agent,
    };
    let ended = agent.run(changes, token).await;
    side.cancel();
    if tokio::time::timeout(FINAL_UPDATE_TIMEOUT, tasks.wait()).await.is_err() {
        tracing::debug!("the final status was not published; the lease will expire");
    }
    tracing::info!("the agent exits; everything it started keeps serving");
    Ok(if publisher_died.is_cancelled() { Ended::TaskPanicked } else { ended })
}
