//! Images of old releases make room for new ones, on a disk that would be full otherwise.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::time::Duration;

use crate::support::{
    engine::Engine,
    images::build_large,
    lab::{Lab, Setup},
    load::{Load, mixed},
    names::free_address,
    process::docker,
    registry::Registry,
};
use demae::model::status::{AppStatus, State};

/// Deploys, of which six fill the disk.
const VERSIONS: usize = 9;
/// The size of an image.
const BYTES: u64 = 12 << 20;

#[test]
fn images_of_old_releases_make_room_for_new_ones() {
    let (engine, _disk) = Engine::with_network_on_a_small_disk("160m");
    let sections = "[images]\nclean_above = 60\nclean_to = 50\nkeep_for = \"0s\"\n";
    let mut lab = Lab::with(&Setup { no_agent: true, sections, ..Setup::default() });
    let registry = Registry::start(free_address(), lab.dir.path());
    for n in 1..=VERSIONS {
        let (name, dir) = (format!("demae-lab-{}-large:v{n}", lab.tag), lab.path(&format!("large{n}")));
        build_large(&name, &format!("v{n}"), &dir, BYTES);
        registry.push(&name, &format!("v{n}"));
        docker(&["rmi", "-f", &name]);
        std::fs::remove_dir_all(dir).expect("removed");
    }
    // Of others: loaded by a person, and a second name of an image that the agent pulls.
    let foreign = lab.image("v1");
    engine.load(&foreign);
    lab.start_agent(&[("DOCKER_HOST", &engine.host())]);
    let name = |n: usize| registry.name(&format!("v{n}"));
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&name(1), "web.test", "network_mode: none\n"));
    engine.docker(&["tag", &name(1), "mine:kept"]);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(10)));
    for n in 2..=VERSIONS {
        lab.deploy("web", "apps/web/image", &name(n));
    }
    let is_here = |image: &str| !engine.docker(&["images", "-q", image]).is_empty();
    let here: Vec<usize> = (1..=VERSIONS).filter(|n| is_here(&name(*n))).collect();
    assert!(here.ends_with(&[VERSIONS - 2, VERSIONS - 1, VERSIONS]), "the ways back stay: {here:?}");
    assert!(!here.contains(&1) && here.len() < 6, "old ones made room: {here:?}");
    assert!(is_here(&foreign) && is_here("mine:kept"), "images of others stay");

    // The last ones need no registry.
    let back = lab.deploy("web", "apps/web/image", &name(VERSIONS - 1));
    assert!(back.timeline.iter().all(|moment| moment.what != "pulled"), "{:?}", back.timeline);
    // A release whose image was removed is pulled again, by the digest that it had.
    lab.deploy("web", "apps/web/image", &name(2));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);

    let shown = lab.demae_with(&[("DOCKER_HOST", &engine.host())], &["images", "-o", "json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("it is JSON");
    let of = |n: usize| {
        let images = shown["images"].as_array().expect("images");
        images.iter().find(|image| image["image"] == name(n)).map(|image| image["kept"].clone())
    };
    assert_eq!(of(2), Some("a container has it".into()), "{shown}");
    assert_eq!(of(VERSIONS - 1), Some("web may go back to it".into()), "{shown}");
    assert!(lab.app("web").is_some_and(|app| app.state == State::Converged));

    // What cannot be read is not taken for empty: nothing is removed, and pulls go on.
    lab.kill_agent();
    std::fs::write(lab.path("state/images.json"), "{").expect("a file");
    lab.start_agent(&[("DOCKER_HOST", &engine.host())]);
    let before: Vec<usize> = (1..=VERSIONS).filter(|n| is_here(&name(*n))).collect();
    lab.deploy("web", "apps/web/image", &name(3));
    assert!(before.iter().all(|n| is_here(&name(*n))), "nothing is removed");
    assert_eq!(std::fs::read_to_string(lab.path("state/images.json")).expect("a file"), "{");
}

#[test]
fn an_image_larger_than_the_disk_is_given_up_before_the_disk_is_full() {
    let (engine, _disk) = Engine::with_network_on_a_small_disk("160m");
    let mut lab = Lab::with(&Setup { no_agent: true, sections: "[images]\nrefuse_above = 90\n", ..Setup::default() });
    let registry = Registry::start(free_address(), lab.dir.path());
    registry.push(&lab.image("v1"), "v1");
    let (large, dir) = (format!("demae-lab-{}-large:v2", lab.tag), lab.path("large"));
    build_large(&large, "v2", &dir, 300 << 20);
    registry.push(&large, "v2");
    docker(&["rmi", "-f", &large]);
    std::fs::remove_dir_all(dir).expect("removed");
    lab.start_agent(&[("DOCKER_HOST", &engine.host())]);
    let spec = lab.socket_spec(&registry.name("v1"), "web.test", "network_mode: none\n");
    lab.deploy("web", "apps/web/spec", &spec);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(10)));
    lab.put("apps/web/image", &registry.name("v2"));
    let is_refused = |app: &AppStatus| app.is("disk_full") && app.reason.contains("`images.refuse_above`");
    let app = lab.wait_app("web", "refused", is_refused);
    assert!(app.healthy > 0, "{app:?}");
    // What was there of it is gone again, and there is room for another one.
    registry.push(&lab.image("v3"), "v3");
    lab.deploy("web", "apps/web/image", &registry.name("v3"));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}
