//! The engine hangs, loses responses, goes silent or sends too many events. A proxy between the agent and the engine of
//! this machine decides what is passed on.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use crate::support::{
    containers::{ids, inspect, is_done, kill_and_wait, only},
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    mishaps::wait as wait_longer,
    process::docker,
    relay::{Relay, is, lists_containers_of, post},
    wait::{until, until_within},
};
use demae::model::status::State;

/// A host whose agent reaches Docker through a proxy, with a resync every second.
fn relayed() -> (Lab, Relay) {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"", ..Setup::default() });
    let relay = Relay::start(&lab.path("docker.sock"));
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    (lab, relay)
}

/// Deploys an app without network, which starts quickly.
fn deploy(lab: &Lab, app: &str) {
    let spec = lab.socket_spec(&lab.image("v1"), &format!("{app}.test"), "network_mode: none\n");
    lab.deploy(app, &format!("apps/{app}/spec"), &spec);
}

#[test]
fn hanging_docker_call_delays_only_its_own_app() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    deploy(&lab, "other");
    let images = [lab.image("v2"), lab.image("v1")];
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    let calls = ["list", "inspect", "image", "create", "start", "update", "stop", "remove"];
    for (round, call) in calls.into_iter().enumerate() {
        let image = &images[round % 2];
        match call {
            "list" => relay.hold_next(lists_containers_of("web")),
            "inspect" => relay.hold_next(is("GET", &format!("/containers/{}/json", only(&lab, "web")))),
            "image" => relay.hold_next(is("GET", "/images/")),
            "create" => relay.hold_next(is("POST", "/containers/create")),
            "remove" => relay.hold_next(is("DELETE", "/containers/")),
            // Only the deployed app is started, updated or stopped now.
            step => relay.hold_next(is("POST", &format!("/{step}"))),
        }
        lab.put("apps/web/image", image);
        until(&format!("`{call}` hangs"), || relay.held() == 1);
        let before = load.requests();
        // Events still arrive, and are acted on.
        kill_and_wait(&lab, "other", "other.test");
        until("requests are served all the same", || load.requests() > before + 100);
        assert_eq!(relay.held(), 1, "`{call}` hangs still");
        let status = lab.app("web").expect("a status");
        assert!(status.state == State::Converging && !status.reason.is_empty(), "`{call}`: {status:?}");
        relay.pass();
        lab.wait_app("web", "converged once Docker answers", is_done(image));
        until("only one container is left", || ids(&lab, "web").len() == 1);
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// The only test that waits for the deadline of an ordinary call, which is a minute.
#[test]
fn hanging_engine_is_reported_and_costs_only_time() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let (before, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(10)));
    relay.hold(|_| true);
    lab.put("apps/web/image", &image);
    wait_longer("the host reports that Docker does not answer", || {
        lab.status().is_some_and(|s| s.proxy.is_some_and(|note| note.contains("Docker does not answer")))
    });
    wait_longer("the app reports it too", || {
        lab.app("web").is_some_and(|a| a.is("unobserved") && a.reason.contains("Docker does not answer"))
    });
    assert!(lab.metric("demae_docker_errors_total", "operation=\"list\"") >= 1.0);
    assert_eq!(only(&lab, "web"), before, "nothing was changed");
    relay.pass();
    lab.wait_app("web", "converged once Docker answers", is_done(&image));
    until("the note is gone", || lab.status().is_some_and(|s| s.proxy.is_none()));
    assert_eq!(ids(&lab, "web").len(), 1);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// As before Docker is installed, or after its socket was removed.
#[test]
fn missing_engine_socket_is_waited_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("docker.sock");
    let sections = format!("[docker]\nsocket = \"{}\"", socket.display());
    let mut lab = Lab::with(&Setup { no_agent: true, sections: &sections, ..Setup::default() });
    lab.start_agent(&[]);
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", "network_mode: none\n"));
    until("it is reported", || {
        lab.status().is_some_and(|s| s.proxy.is_some_and(|note| note.contains("Docker does not answer")))
    });
    let advice = lab.demae(&["doctor"]);
    let text = String::from_utf8_lossy(&advice.stdout).into_owned();
    assert!(!advice.status.success() && text.contains("FAIL  docker") && text.contains("start Docker"), "{text}");
    assert!(text.contains("ok    etcd"), "everything else was checked too: {text}");
    let _relay = Relay::start(&socket);
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
}

/// The deadline of a stop is the grace period plus 15 seconds.
#[test]
fn stop_that_hangs_past_its_deadline_is_retried() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let image = lab.image("v2");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    relay.hold(is("POST", "/stop"));
    lab.put("apps/web/image", &image);
    let status = lab.wait_app("web", "reporting that it cannot be stopped", |s| {
        s.is("cooling_down") && s.is("docker_unreachable") && s.reason.contains("`stop`")
    });
    assert_eq!((status.healthy, status.serving, ids(&lab, "web").len()), (1, None, 2), "the new one serves meanwhile");
    relay.pass();
    lab.wait_app("web", "converged", is_done(&image));
    assert_eq!(ids(&lab, "web").len(), 1);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn broken_or_silent_event_stream_is_recovered_from() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let subscriptions = || relay.seen(is("GET", "/events"));
    let wait_subscribed = |known: usize| until("it is subscribed again", || subscriptions() > known);
    // The stream is closed, and requested again.
    let known = subscriptions();
    relay.cut();
    wait_subscribed(known);
    kill_and_wait(&lab, "web", "web.test");
    // Requested, and not answered.
    relay.hold(is("GET", "/events"));
    relay.cut();
    until("the request is held", || relay.held() == 1);
    kill_and_wait(&lab, "web", "web.test");
    relay.pass();
    // Answered, and silent.
    let known = subscriptions();
    relay.mute(is("GET", "/events"));
    relay.cut();
    wait_subscribed(known);
    kill_and_wait(&lab, "web", "web.test");
    // Everything works again, and events arrive at once.
    let known = subscriptions();
    relay.pass();
    relay.cut();
    wait_subscribed(known);
    kill_and_wait(&lab, "web", "web.test");
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
}

/// Stops the flood when dropped, also when the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn flood_of_events_delays_no_deploy() {
    let (lab, _relay) = relayed();
    deploy(&lab, "web");
    deploy(&lab, "other");
    let flooded = only(&lab, "web");
    let image = lab.image("v2");
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(true), Client::post(false)]);
    let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    // A signal without effect is an event like any other.
    let path = format!("/containers/{flooded}/kill?signal=WINCH");
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    post(&path).expect("the engine answers");
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _stop = StopOnDrop(&over);
        until("the flood has begun", || sent.load(Ordering::Relaxed) > 100);
        lab.put("apps/other/image", &image);
        lab.wait_app("other", "deployed beside the flood", is_done(&image));
        lab.put("apps/web/image", &image);
        lab.wait_app("web", "deployed during the flood", |s| {
            s.image.as_ref() == Some(&image) && s.serving.is_none() && s.healthy == 1
        });
    });
    lab.wait_app("web", "converged", is_done(&image));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn call_whose_response_was_lost_is_not_repeated() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let images = [lab.image("v2"), lab.image("v1")];
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    for (round, call) in ["create", "start", "update", "stop", "remove"].into_iter().enumerate() {
        let image = &images[round % 2];
        let lost = relay.lost();
        match call {
            "create" => relay.lose_next(is("POST", "/containers/create")),
            "remove" => relay.lose_next(is("DELETE", "/containers/")),
            step => relay.lose_next(is("POST", &format!("/{step}"))),
        }
        let mut most = 0;
        lab.put("apps/web/image", image);
        until(&format!("it converges though the answer of `{call}` was lost"), || {
            most = most.max(ids(&lab, "web").len());
            lab.app("web").as_ref().is_some_and(is_done(image))
        });
        assert_eq!(relay.lost(), lost + 1, "the answer of `{call}` was lost");
        assert_eq!(most, 2, "only the old and the new one, around `{call}`");
        assert_eq!(ids(&lab, "web").len(), 1, "after `{call}`");
        // The number in its name: a second instance of the release would be `.2`.
        assert!(inspect(&only(&lab, "web"), "{{.Name}}").ends_with(".1"));
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// The image is present, and the agent cannot know: the inspect fails. It must not act on an older one.
#[test]
fn no_step_runs_for_an_app_that_cannot_be_inspected() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let image = lab.image("v2");
    relay.lose(lists_containers_of("web"));
    let done = || relay.seen(|line| line.starts_with("POST ") || line.starts_with("DELETE "));
    let before = done();
    lab.put("apps/web/image", &image);
    lab.wait_app("web", "not inspected", |s| s.is("unobserved"));
    let lists = lab.metric("demae_docker_lists_total", "");
    until("all else is inspected", || lab.metric("demae_docker_lists_total", "") >= lists + 4.0);
    assert_eq!(done(), before, "it acted on an inspect older than the change: {}", lab.agent_log());
    relay.pass();
    lab.wait_app("web", "converged once it is inspected", is_done(&image));
    assert_eq!(relay.seen(is("POST", "/images/create")), 0, "nothing had to be pulled");
}

/// An image that lost its tags while in use would stay for ever. It gets the lab's tags back, and is removed with
/// the lab.
struct RetagOnDrop<'a>(&'a Lab);

impl Drop for RetagOnDrop<'_> {
    fn drop(&mut self) {
        for (id, version) in ids(self.0, "web").iter().zip(["v1", "v2"]) {
            docker(&["tag", &inspect(id, "{{.Image}}"), &self.0.own_image(version)]);
        }
    }
}

#[test]
fn image_removed_between_pull_and_create_is_pulled_again() {
    let (lab, relay) = relayed();
    let registry = crate::support::registry::Registry::start(crate::support::names::free_address(), lab.dir.path());
    let _retag = RetagOnDrop(&lab);
    for version in ["v1", "v2"] {
        registry.push(&lab.own_image(version), version);
        // No other tag may keep it.
        docker(&["rmi", "-f", &lab.own_image(version)]);
    }
    let (v1, v2) = (registry.name("v1"), registry.name("v2"));
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&v1, "web.test", "network_mode: none\n"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    let pulls = || relay.seen(is("POST", "/images/create"));
    let before = pulls();
    relay.hold_next(is("POST", "/containers/create"));
    lab.put("apps/web/image", &v2);
    until("it was pulled and the create call is held", || relay.held() == 1);
    // As `docker image prune` would; that would remove other images too.
    docker(&["rmi", "-f", &v2]);
    assert_eq!(docker(&["images", "-q", &v2]), "", "it is removed");
    relay.pass();
    lab.wait_app("web", "converged with it", is_done(&v2));
    assert_eq!(pulls(), before + 2);
    assert!(lab.app("web").is_some_and(|a| a.verdict.is_none()));

    // Pruning all the time may cost time, and nothing else.
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                docker(&["rmi", "-f", &v1]);
            }
        });
        let _stop = StopOnDrop(&over);
        let known = pulls();
        lab.put("apps/web/image", &v1);
        until("it was pulled", || pulls() > known);
    });
    lab.wait_app("web", "converged once pruning ends", is_done(&v1));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// The only test that waits for the longest silence allowed to a registry.
#[test]
fn silent_pull_is_cancelled_and_retried() {
    let (lab, relay) = relayed();
    let registry = crate::support::registry::Registry::start(crate::support::names::free_address(), lab.dir.path());
    for version in ["v1", "v2"] {
        registry.push(&lab.image(version), version);
    }
    let (v1, v2) = (registry.name("v1"), registry.name("v2"));
    let spec = lab.socket_spec(&v1, "web.test", "network_mode: none\npull_policy: always\n");
    lab.deploy("web", "apps/web/spec", &spec);
    deploy(&lab, "other");
    let (before, load) = (only(&lab, "web"), Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(10))));
    let pulls = || relay.seen(is("POST", "/images/create"));
    let known = pulls();
    relay.mute(is("POST", "/images/create"));
    lab.put("apps/web/image", &v2);
    until("it is being pulled", || pulls() > known);
    lab.deploy("other", "apps/other/restart", "other apps are not delayed");
    assert_eq!(pulls(), known + 1, "it is waited for");
    until_within(Duration::from_secs(180), "the silent registry is reported", || {
        lab.app("web").is_some_and(|a| a.is("image") && a.reason.contains("for 120 s"))
    });
    assert_eq!(only(&lab, "web"), before);
    relay.pass();
    lab.wait_app("web", "converged", is_done(&v2));
    assert!(pulls() >= known + 2, "it was pulled again");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// An agent was killed while its create call was in flight: the name is reserved, and there is no container yet.
#[test]
fn name_of_a_create_call_in_flight_is_waited_for() {
    let (lab, relay) = relayed();
    relay.refuse_next(is("POST", "/containers/create"), "Conflict. The container name is already in use by container");
    deploy(&lab, "web");
    let status = lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    let release = status.release.expect("a release");
    assert_eq!(lab.containers(), [format!("demae.{}.web.{release}.1", lab.host)], "once, under its own name");
    assert_eq!(relay.seen(is("POST", "/containers/create")), 2);
    assert_eq!(lab.metric("demae_step_failures_total", "kind=\"create\""), 1.0);
}

/// The removal in flight may take long, or fail.
#[test]
fn removal_in_flight_is_waited_for() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let (old, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    let removal = is("DELETE", &format!("/containers/{old}"));
    let asked = relay.seen(&removal);
    for _ in 0..2 {
        relay.refuse_next(is("DELETE", "/containers/"), "removal of container is already in progress");
    }
    lab.put("apps/web/image", &image);
    lab.wait_app("web", "converged", is_done(&image));
    assert!(relay.seen(&removal) >= asked + 3, "it was found still present, and removed again");
    assert_ne!(only(&lab, "web"), old);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}
