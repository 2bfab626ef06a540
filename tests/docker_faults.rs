//! The engine hangs, loses answers, goes silent or talks too much. What is passed to it and what is not is up to a relay
//! between the agent and the engine of this machine.

mod support;

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use demae::model::status::State;
use support::{
    containers::{ids, inspect, is_done, kill_and_wait, only},
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    mishaps::wait as wait_longer,
    process::docker,
    relay::{Relay, is, looks_at, post},
    wait::{until, until_within},
};

/// A host whose agent reaches Docker by a relay. It looks at everything once a second.
fn relayed() -> (Lab, Relay) {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"", ..Setup::default() });
    let relay = Relay::start(&lab.path("docker.sock"));
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    (lab, relay)
}

/// Deploys an app that needs no network, and so starts quickly.
fn deploy(lab: &Lab, app: &str) {
    let spec = lab.socket_spec(&lab.image("v1"), &format!("{app}.test"), "network_mode: none\n");
    lab.deploy(app, &format!("apps/{app}/spec"), &spec);
}

#[test]
fn a_call_that_hangs_holds_up_its_own_app_and_no_request() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    deploy(&lab, "other");
    let images = [lab.image("v2"), lab.image("v1")];
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    let calls = ["list", "inspect", "image", "create", "start", "update", "stop", "remove"];
    for (round, call) in calls.into_iter().enumerate() {
        let image = &images[round % 2];
        match call {
            "list" => relay.hold_next(looks_at("web")),
            "inspect" => relay.hold_next(is("GET", &format!("/containers/{}/json", only(&lab, "web")))),
            "image" => relay.hold_next(is("GET", "/images/")),
            "create" => relay.hold_next(is("POST", "/containers/create")),
            "remove" => relay.hold_next(is("DELETE", "/containers/")),
            // Only the app that is deployed is started, changed or stopped now.
            step => relay.hold_next(is("POST", &format!("/{step}"))),
        }
        lab.put("apps/web/image", image);
        until(&format!("`{call}` hangs"), || relay.held() == 1);
        let before = load.requests();
        // Events still arrive, and what they are about is done.
        kill_and_wait(&lab, "other", "other.test");
        until("requests flow all the same", || load.requests() > before + 100);
        assert_eq!(relay.held(), 1, "`{call}` hangs still");
        let status = lab.app("web").expect("a status");
        assert!(status.state == State::Converging && !status.reason.is_empty(), "`{call}`: {status:?}");
        relay.pass();
        lab.wait_app("web", "converged once Docker answers", is_done(image));
        until("nothing is there twice", || ids(&lab, "web").len() == 1);
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// The only one that waits for the deadline of an ordinary call, which is a minute.
#[test]
fn an_engine_that_hangs_for_good_is_told_of_and_costs_nothing_but_time() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let (before, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(10)));
    relay.hold(|_| true);
    lab.put("apps/web/image", &image);
    wait_longer("it is told that Docker does not answer", || {
        lab.status().is_some_and(|s| s.proxy.is_some_and(|note| note.contains("Docker does not answer")))
    });
    wait_longer("it is told for the app too", || {
        lab.app("web").is_some_and(|a| a.reason.contains("cannot be seen now: Docker does not answer"))
    });
    assert!(lab.metric("demae_docker_errors_total", "operation=\"list\"") >= 1.0);
    assert_eq!(only(&lab, "web"), before, "nothing was concluded from silence");
    relay.pass();
    lab.wait_app("web", "converged once Docker answers", is_done(&image));
    until("the note is gone", || lab.status().is_some_and(|s| s.proxy.is_none()));
    assert_eq!(ids(&lab, "web").len(), 1);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// As before Docker is installed, or after its socket was removed.
#[test]
fn an_engine_whose_socket_is_not_there_is_waited_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("docker.sock");
    let sections = format!("[docker]\nsocket = \"{}\"", socket.display());
    let mut lab = Lab::with(&Setup { no_agent: true, sections: &sections, ..Setup::default() });
    lab.start_agent(&[]);
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", "network_mode: none\n"));
    until("it is told", || {
        lab.status().is_some_and(|s| s.proxy.is_some_and(|note| note.contains("Docker does not answer")))
    });
    let advice = lab.demae(&["doctor"]);
    let text = String::from_utf8_lossy(&advice.stdout).into_owned();
    assert!(!advice.status.success() && text.contains("FAIL  docker") && text.contains("start Docker"), "{text}");
    assert!(text.contains("ok    etcd"), "all else was looked at too: {text}");
    let _relay = Relay::start(&socket);
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
}

/// The deadline of a stop is the grace and 15 seconds more.
#[test]
fn a_stop_that_hangs_past_its_deadline_is_tried_again() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let image = lab.image("v2");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    relay.hold(is("POST", "/stop"));
    lab.put("apps/web/image", &image);
    let status = lab.wait_app("web", "told that it cannot be stopped", |s| {
        s.reason.contains("step `stop` failed") && s.reason.contains("Docker does not answer")
    });
    assert_eq!((status.healthy, status.serving, ids(&lab, "web").len()), (1, None, 2), "the new one serves meanwhile");
    relay.pass();
    lab.wait_app("web", "converged", is_done(&image));
    assert_eq!(ids(&lab, "web").len(), 1);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn events_that_break_off_or_never_come_are_made_up_for() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let listening = || relay.seen(is("GET", "/events"));
    let again = |known: usize| until("it listens again", || listening() > known);
    // Broken off, and asked for anew.
    let known = listening();
    relay.cut();
    again(known);
    kill_and_wait(&lab, "web", "web.test");
    // Asked for, and not answered.
    relay.hold(is("GET", "/events"));
    relay.cut();
    until("nobody answers", || relay.held() == 1);
    kill_and_wait(&lab, "web", "web.test");
    relay.pass();
    // Answered, and silent.
    let known = listening();
    relay.mute(is("GET", "/events"));
    relay.cut();
    again(known);
    kill_and_wait(&lab, "web", "web.test");
    // All is well again, and quick again.
    let known = listening();
    relay.pass();
    relay.cut();
    again(known);
    kill_and_wait(&lab, "web", "web.test");
    lab.wait_app("web", "as it should be", |s| s.state == State::Converged && s.healthy == 1);
}

/// Tells a flood to end, also when the test fails.
struct Dam<'a>(&'a AtomicBool);

impl Drop for Dam<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_flood_of_events_holds_up_no_deploy() {
    let (lab, _relay) = relayed();
    deploy(&lab, "web");
    deploy(&lab, "other");
    let flooded = only(&lab, "web");
    let image = lab.image("v2");
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(true), Client::post(false)]);
    let (over, told) = (AtomicBool::new(false), AtomicU64::new(0));
    // A signal that changes nothing is an event like any other.
    let path = format!("/containers/{flooded}/kill?signal=WINCH");
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    post(&path).expect("the engine answers");
                    told.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _dam = Dam(&over);
        until("it pours", || told.load(Ordering::Relaxed) > 100);
        lab.put("apps/other/image", &image);
        lab.wait_app("other", "deployed beside it", is_done(&image));
        lab.put("apps/web/image", &image);
        lab.wait_app("web", "deployed in the flood", |s| {
            s.image.as_ref() == Some(&image) && s.serving.is_none() && s.healthy == 1
        });
    });
    lab.wait_app("web", "converged", is_done(&image));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn what_was_done_and_not_answered_is_not_done_twice() {
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
        assert_eq!(most, 2, "the old one and the new one, and no other, around `{call}`");
        assert_eq!(ids(&lab, "web").len(), 1, "after `{call}`");
        // Its number tells: a second one of the release would be `.2`.
        assert!(inspect(&only(&lab, "web"), "{{.Name}}").ends_with(".1"));
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// The image is here, and the agent cannot know: the look that would tell it fails. It must not go by an older one.
#[test]
fn nothing_is_done_for_an_app_that_cannot_be_seen() {
    let (lab, relay) = relayed();
    deploy(&lab, "web");
    let image = lab.image("v2");
    relay.lose(looks_at("web"));
    let done = || relay.seen(|line| line.starts_with("POST ") || line.starts_with("DELETE "));
    let before = done();
    lab.put("apps/web/image", &image);
    lab.wait_app("web", "not seen", |s| s.reason.contains("cannot be seen now"));
    let lists = lab.metric("demae_docker_lists_total", "");
    until("all else is looked at", || lab.metric("demae_docker_lists_total", "") >= lists + 4.0);
    assert_eq!(done(), before, "it goes by a look that is older than the wish: {}", lab.agent_log());
    relay.pass();
    lab.wait_app("web", "converged once it is seen", is_done(&image));
    assert_eq!(relay.seen(is("POST", "/images/create")), 0, "nothing had to be pulled");
}

/// An image that lost its names while a container used it would stay for ever. It gets those of the lab's own back, and
/// goes with them.
struct Named<'a>(&'a Lab);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        for (id, version) in ids(self.0, "web").iter().zip(["v1", "v2"]) {
            docker(&["tag", &inspect(id, "{{.Image}}"), &self.0.image(version)]);
        }
    }
}

#[test]
fn an_image_that_goes_between_its_pull_and_its_use_is_pulled_again() {
    let (lab, relay) = relayed();
    let registry = support::registry::Registry::start(support::names::free_address(), lab.dir.path());
    let _named = Named(&lab);
    for version in ["v1", "v2"] {
        registry.push(&lab.image(version), version);
        // No other name may keep it here.
        docker(&["rmi", "-f", &lab.image(version)]);
    }
    let (v1, v2) = (registry.name("v1"), registry.name("v2"));
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&v1, "web.test", "network_mode: none\n"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    let pulls = || relay.seen(is("POST", "/images/create"));
    let before = pulls();
    relay.hold_next(is("POST", "/containers/create"));
    lab.put("apps/web/image", &v2);
    until("it was pulled and is about to be used", || relay.held() == 1);
    // As `docker image prune` would; that would take the images of others too.
    docker(&["rmi", "-f", &v2]);
    assert_eq!(docker(&["images", "-q", &v2]), "", "it is gone");
    relay.pass();
    lab.wait_app("web", "converged with it", is_done(&v2));
    assert_eq!(pulls(), before + 2);
    assert!(lab.app("web").is_some_and(|a| a.verdict.is_none()));

    // Whoever clears up all the time may cost time, and nothing else.
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                docker(&["rmi", "-f", &v1]);
            }
        });
        let _dam = Dam(&over);
        let known = pulls();
        lab.put("apps/web/image", &v1);
        until("it was pulled", || pulls() > known);
    });
    lab.wait_app("web", "converged once nobody clears up", is_done(&v1));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// The only one that waits for the longest silence that a registry is allowed.
#[test]
fn a_pull_that_goes_silent_is_cut_and_tried_again() {
    let (lab, relay) = relayed();
    let registry = support::registry::Registry::start(support::names::free_address(), lab.dir.path());
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
    lab.deploy("other", "apps/other/restart", "nobody else is held up");
    assert_eq!(pulls(), known + 1, "it is waited for");
    until_within(Duration::from_secs(180), "it is told whose silence it was", || {
        lab.app("web").is_some_and(|a| a.reason.contains("the registry said nothing for 120 s"))
    });
    assert_eq!(only(&lab, "web"), before);
    relay.pass();
    lab.wait_app("web", "converged", is_done(&v2));
    assert!(pulls() >= known + 2, "it was pulled anew");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// An agent was killed while the engine made a container for it: the name is taken, and there is no container yet.
#[test]
fn a_name_that_is_reserved_for_a_container_to_come_is_waited_for() {
    let (lab, relay) = relayed();
    relay.refuse_next(is("POST", "/containers/create"), "Conflict. The container name is already in use by container");
    deploy(&lab, "web");
    let status = lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    let release = status.release.expect("a release");
    assert_eq!(lab.containers(), [format!("demae.{}.web.{release}.1", lab.host)], "by its own name, and once");
    assert_eq!(relay.seen(is("POST", "/containers/create")), 2);
    assert_eq!(lab.metric("demae_step_failures_total", "kind=\"create\""), 1.0);
}

/// Whoever removes it may take long, or fail.
#[test]
fn a_removal_that_is_under_way_is_waited_for() {
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
    assert!(relay.seen(&removal) >= asked + 3, "it was seen to be there still, and removed again");
    assert_ne!(only(&lab, "web"), old);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}
