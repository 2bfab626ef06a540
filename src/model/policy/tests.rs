use super::*;

fn app(name: &str) -> AppName {
    AppName::try_from(name).expect("a name")
}

#[test]
fn own_volumes_are_named_for_the_app() {
    for (name, is_own) in [("web", true), ("web_data", true), ("web.data", true), ("web-data", false), ("web2", false)]
    {
        assert_eq!(is_own_volume(&app("web"), name), is_own, "{name}");
    }
}

#[test]
fn what_a_path_leads_to_must_be_allowed_too() {
    let text = "[mounts]\nallow = [{path = '/srv/{app}', mode = 'rw'}, {path = '/srv/linked', mode = 'ro'}]";
    let policy = Policy::parse("web1", "policy.toml", text).expect("it is valid");
    // A link in the place of a directory that a rule names does not widen it: an app may have made it.
    let resolve = |dir: &str| Some(if dir == "/srv/linked" { "/etc".to_owned() } else { dir.to_owned() });
    let admits = |real: &str, read_only| policy.admits_real_path(&app("web"), real, (read_only, false), &resolve);
    assert!(admits("/srv/web/a", false) && admits("/srv/linked/a", true));
    assert!(!admits("/srv/linked/a", false) && !admits("/etc", true) && !admits("/etc/a", true));
    // Without rules, root may have put one of the free directories elsewhere.
    let elsewhere = |dir: &str| Some(if dir == "/srv" { "/disk/srv".to_owned() } else { dir.to_owned() });
    let free = |real: &str| BUILT_IN.admits_real_path(&app("web"), real, (false, false), &elsewhere);
    assert!(free("/disk/srv/a") && free("/opt/a") && !free("/srv/a") && !free("/disk/srv"));
    assert!(!BUILT_IN.admits_real_path(&app("web"), "/opt/a", (true, true), &elsewhere), "a socket");
    let archive = |real: &str| BUILT_IN.admits_archive(&app("web"), real, &elsewhere);
    assert!(archive("/disk/srv/a.tar") && !archive("/etc/shadow"));
}

#[test]
fn a_file_that_cannot_be_used_allows_nothing() {
    let policy = Policy::unusable("web1", "policy.toml", "its policy cannot be used: it is broken");
    let asked = Asked { app: &app("web"), image: None, container: &ContainerSpec::default(), ingress: None };
    let found = policy.refusals_of(asked, std::iter::empty());
    assert_eq!(found[0].to_string(), "host `web1` creates nothing: its policy cannot be used: it is broken");
}
