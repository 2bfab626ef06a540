//! Rollouts over several hosts: agents with an nginx each, on one etcd and one Docker engine.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "no answer is no version; a test tells its figures"
)]

use std::time::{Duration, Instant};

use demae::model::{
    fleet::{CommandRun, Leader, Rollout, RolloutPhase},
    status::AppStatus,
};

use crate::support::{
    fleet::{Fleet, expect_none_lost},
    lab::Lab,
    load::get,
    process::docker,
    wait::until,
};

#[test]
fn release_goes_over_the_hosts_one_after_the_other() {
    let fleet = Fleet::new(3);
    let first = fleet.serve("500ms");
    let loads = fleet.load();
    let began = Instant::now();
    let image = fleet.store().image("v2");
    fleet.store().put("apps/web/image", &image);
    // A host answers with the new release only while it has a turn, or has proven it.
    let mut most = 0;
    until("all hosts serve the new release", || {
        most = most.max(fleet.store().list("state/permits/").len());
        fleet.versions().values().all(|version| version == "v2")
    });
    let done = fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    println!("three hosts in {:?}", began.elapsed());
    assert_eq!(most, 1, "turns at a time");
    assert!(began.elapsed() >= Duration::from_millis(1500), "each host is monitored: {:?}", began.elapsed());
    assert_eq!(done.from.as_ref(), Some(&first.release));
    expect_none_lost(loads);
}

#[test]
fn bad_release_reaches_one_host_and_its_fleet_goes_back() {
    let fleet = Fleet::new(3);
    let good = fleet.serve("500ms");
    let loads = fleet.load();
    fleet.store().put("env/web/MOOD", "exit");
    let reverted = fleet.wait_phase(Some(good.release.as_str()), RolloutPhase::Reverted);
    assert_eq!(reverted.from.as_ref(), Some(&good.release));
    let verdicts = fleet
        .0
        .iter()
        .filter(|lab| !lab.get_key(&format!("state/verdicts/web/{}/{}", reverted.release, lab.host)).is_empty());
    assert_eq!(verdicts.count(), 1, "hosts that tried it");
    // Each says why it runs another release than the wanted one; the one on which it failed has the evidence.
    for lab in &fleet.0 {
        let runs_good = |app: &AppStatus| app.serving.as_deref() == Some(good.release.as_str()) && app.healthy == 1;
        let app = lab.wait_app("web", "back", |app| runs_good(app) && (app.is("turn") || app.is("halted")));
        assert_eq!(app.release.as_deref(), Some(reverted.release.as_str()));
        assert_eq!(app.is("halted"), app.verdict.as_ref().is_some_and(|v| v.exit_code == Some(3)), "{app:?}");
    }
    // A mended release is rolled out again.
    fleet.store().put("env/web/MOOD", "well");
    let done = fleet.wait_phase(Some(reverted.release.as_str()), RolloutPhase::Done);
    assert_eq!(done.from.as_ref(), Some(&good.release), "a release that failed is nothing to go back to");
    expect_none_lost(loads);
}

#[test]
fn release_that_fails_while_it_is_monitored_is_taken_back() {
    let fleet = Fleet::new(2);
    let good = fleet.serve("200ms");
    fleet.put_spec("20s");
    let loads = fleet.load();
    fleet.store().put("env/web/SICK_AFTER_MS", "1500");
    until("requests are on the new release", || {
        let body = |lab: &Lab| get(lab.ingress, "web.test", "/").unwrap_or_default().1;
        fleet.0.iter().any(|lab| !body(lab).contains(good.release.as_str()))
    });
    let reverted = fleet.wait_phase(Some(good.release.as_str()), RolloutPhase::Reverted);
    let tried = fleet
        .0
        .iter()
        .filter(|lab| !lab.get_key(&format!("state/verdicts/web/{}/{}", reverted.release, lab.host)).is_empty());
    assert_eq!(tried.count(), 1);
    for lab in &fleet.0 {
        let (_, body) = get(lab.ingress, "web.test", "/").expect("an answer");
        assert!(body.contains(good.release.as_str()), "{body}");
    }
    expect_none_lost(loads);
}

#[test]
fn killed_leader_is_replaced_and_a_late_host_catches_up() {
    let mut fleet = Fleet::new(3);
    let first = fleet.serve("1s");
    let loads = fleet.load();
    let leader: Leader = serde_json::from_str(&fleet.store().get_key("state/leader")).expect("a leader");
    let image = fleet.store().image("v2");
    fleet.store().put("apps/web/image", &image);
    let at = fleet.0.iter().position(|lab| lab.host == leader.host.as_str()).expect("the leader's host");
    // A host that is killed in its own turn holds up the rollout.
    let has_turn = |lab: &Lab| !lab.get_key(&format!("state/permits/{}/web", lab.host)).is_empty();
    until("another host has a turn", || !has_turn(&fleet.0[at]) && fleet.0.iter().any(has_turn));
    fleet.0[at].kill_agent();
    let killed = Instant::now();
    let others = |fleet: &Fleet| {
        fleet.versions().into_iter().filter(|(host, _)| *host != leader.host.as_str()).collect::<Vec<_>>()
    };
    until("the others serve the new release", || others(&fleet).iter().all(|(_, version)| version == "v2"));
    println!("without the leader: {:?}", killed.elapsed());
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    let next: Leader = serde_json::from_str(&fleet.store().get_key("state/leader")).expect("a leader");
    assert_ne!(next.host, leader.host);
    fleet.0[at].start_agent(&[]);
    until("the late host serves it too", || fleet.versions().values().all(|version| version == "v2"));
    expect_none_lost(loads);
}

#[test]
fn pin_goes_back_and_freeze_holds() {
    let fleet = Fleet::new(2);
    let store = fleet.store();
    let first = fleet.serve("200ms");
    let image = store.image("v2");
    store.put("freeze", "a sale");
    store.put("apps/web/image", &image);
    // The rollout is opened, and no host gets a turn.
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Rolling);
    for lab in &fleet.0 {
        lab.wait_app("web", "waiting", |app| app.is("turn"));
        assert_eq!(lab.get_key(&format!("state/permits/{}/web", lab.host)), "");
    }
    store.del("freeze");
    let second = fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    store.put("apps/web/release", first.release.as_str());
    let pinned = fleet.wait_phase(Some(second.release.as_str()), RolloutPhase::Restored);
    assert!(pinned.pinned && pinned.release == first.release);
    until("all hosts serve the pinned release", || fleet.versions().values().all(|version| version == "v1"));
    store.del("apps/web/release");
    until("all hosts serve the wanted release", || fleet.versions().values().all(|version| version == "v2"));
}

#[test]
fn agent_that_is_killed_in_its_turn_ends_it_after_its_start() {
    let mut fleet = Fleet::new(2);
    let first = fleet.serve("2s");
    let loads = fleet.load();
    let image = fleet.store().image("v2");
    fleet.store().put("apps/web/image", &image);
    until("one host serves the new release", || fleet.versions().values().any(|version| version == "v2"));
    let switched = fleet.versions().into_iter().find(|(_, version)| version == "v2").expect("a host").0;
    let at = fleet.0.iter().position(|lab| lab.host == switched).expect("its host");
    fleet.0[at].kill_agent();
    assert_eq!(fleet.versions().values().filter(|version| *version == "v2").count(), 1, "its nginx serves on");
    fleet.0[at].start_agent(&[]);
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    assert!(fleet.versions().values().all(|version| version == "v2"));
    expect_none_lost(loads);
}

#[test]
fn canary_waits_for_its_promotion() {
    let fleet = Fleet::new(2);
    let store = fleet.store();
    let first = fleet.serve("100ms");
    let more = "deploy: {update_config: {canary: 1, monitor: 100ms}}\n";
    store.put("apps/web/spec", &store.socket_spec(&store.image("v2"), "web.test", more));
    let waiting = fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Waiting);
    let served = fleet.versions();
    assert_eq!(served.values().filter(|version| *version == "v2").count(), 1, "{served:?}");
    // Another name promotes nothing: the next decision is seen by what it leaves as it is.
    store.put("apps/web/promote", first.release.as_str());
    store.put("apps/web/promote", waiting.release.as_str());
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    assert!(fleet.versions().values().all(|version| version == "v2"));
}

/// How often containers of commands of `web` were started since a time, by the engine's own account.
fn command_starts(fleet: &Fleet, since: &str) -> usize {
    let now = docker(&["system", "info", "--format", "{{.SystemTime}}"]);
    let until = now.trim().to_owned();
    let events = docker(&[
        "events",
        "--since",
        since,
        "--until",
        &until,
        "--filter",
        "event=start",
        "--format",
        "{{.Actor.Attributes.name}}",
    ]);
    let is_own = |name: &&str| {
        name.ends_with(".command") && fleet.0.iter().any(|lab| name.starts_with(&format!("demae.{}.web.", lab.host)))
    };
    events.lines().filter(is_own).count()
}

#[test]
fn release_command_runs_once_in_the_fleet_before_its_release() {
    let fleet = Fleet::new(2);
    let store = fleet.store();
    let first = fleet.serve("200ms");
    let since = docker(&["system", "info", "--format", "{{.SystemTime}}"]).trim().to_owned();
    let spec = |command: &str| {
        let more = format!("deploy: {{update_config: {{monitor: 200ms}}}}\nrelease_command: {command}\n");
        store.socket_spec(&store.image("v1"), "web.test", &more)
    };
    let loads = fleet.load();
    // It is no part of the release: what runs stays.
    store.put("apps/web/spec", &spec("[exit, '0', '1500']"));
    store.put("apps/web/image", &store.image("v2"));
    let key = |rollout: &Rollout| format!("state/commands/web/{}", rollout.release);
    let second = fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Rolling);
    until("the command runs", || store.get_key(&key(&second)).contains("started"));
    assert!(fleet.versions().values().all(|version| version == "v1"), "{:?}", fleet.versions());
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    assert!(store.get_key(&key(&second)).contains("done"));
    assert_eq!(command_starts(&fleet, &since), 1);

    // A failure is that of the release, whatever may fail: no host starts it. Another try runs it again.
    store.put("apps/web/spec", &spec("[exit, '7']"));
    store.put("env/web/MOOD", "well");
    let failed = fleet.wait_phase(Some(second.release.as_str()), RolloutPhase::Reverted);
    assert!(failed.reason.contains("exit code 7"), "{}", failed.reason);
    assert!(store.get_key(&key(&failed)).contains("failed"));
    assert_eq!(command_starts(&fleet, &since), 2);
    for lab in &fleet.0 {
        assert_eq!(
            docker(&[
                "ps",
                "-aq",
                "--filter",
                &format!("label=demae.release={}", failed.release),
                "--filter",
                &format!("label=demae.host={}", lab.host)
            ]),
            ""
        );
    }
    store.put("apps/web/spec", &spec("[exit, '0']"));
    let retried = store.demae(&["retry", "web", "--timeout", "60s"]);
    assert_eq!(retried.status.code(), Some(0), "{}", String::from_utf8_lossy(&retried.stderr));
    assert_eq!(command_starts(&fleet, &since), 3);
    assert!(fleet.versions().values().all(|version| version == "v2"));
    until("no container of a command is left", || {
        let left = |lab: &Lab| docker(&["ps", "-aq", "--filter", &format!("name=demae.{}.web.*command", lab.host)]);
        fleet.0.iter().all(|lab| left(lab).is_empty())
    });
    expect_none_lost(loads);
}

#[test]
fn agent_killed_while_a_release_command_runs_starts_none_again() {
    let mut fleet = Fleet::new(2);
    let first = fleet.serve("200ms");
    let since = docker(&["system", "info", "--format", "{{.SystemTime}}"]).trim().to_owned();
    let store = fleet.store();
    let more = "deploy: {update_config: {monitor: 200ms}}\nrelease_command: [exit, '0', '3000']\n";
    store.put("apps/web/spec", &store.socket_spec(&store.image("v2"), "web.test", more));
    let rolling = fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Rolling);
    until("the command is started", || command_starts(&fleet, &since) == 1);
    let run: CommandRun =
        serde_json::from_str(&store.get_key(&format!("state/commands/web/{}", rolling.release))).expect("a run");
    let at = fleet.0.iter().position(|lab| lab.host == run.host.as_str()).expect("its host");
    fleet.0[at].kill_agent();
    fleet.0[at].start_agent(&[]);
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    assert_eq!(command_starts(&fleet, &since), 1, "the one that was started is waited for");
    assert!(fleet.versions().values().all(|version| version == "v2"));
}
