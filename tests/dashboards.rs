//! A real Prometheus scrapes a real agent through deploys and mishaps. Then every metric is documented and every
//! documented one was there, every query of every dashboard had data, and no alert fired that should not have.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

mod support;

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use support::{
    dashboards::{self, now, questions},
    lab::{Lab, Setup, until, user_line},
    load::{Load, get, mixed},
    mishaps::{self, Site},
    prometheus::{INSTANCE, Running},
    receiver::Receiver,
    registry::Registry,
};

fn root(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Names of metrics in the tables of docs/metrics.md.
fn documented() -> BTreeSet<String> {
    let text = fs::read_to_string(root("docs/metrics.md")).expect("docs/metrics.md");
    let cells = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    cells.filter(|name| name.starts_with("demae_") || name.starts_with("process_")).map(str::to_owned).collect()
}

/// Names of metrics that the agent shows now, in a text that Prometheus has nothing to say against.
fn exported(lab: &Lab) -> BTreeSet<String> {
    let (_, text) = get(lab.metrics, "localhost", "/metrics").expect("metrics");
    let mut check =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).spawn().expect("promtool");
    check.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("it is taken");
    assert!(check.wait().expect("promtool ends").success(), "promtool check metrics");
    text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn what_the_agent_shows_is_documented_drawn_and_alerted_on() {
    let receiver = Receiver::start(|_| 204);
    let sections = format!("[webhook]\nurl = \"http://{}/\"\n", receiver.address);
    let certificate = root("tests/golden/certificate.pem");
    let nginx = format!("certificates = [\"{}\"]", certificate.display());
    let lab = Lab::with(&Setup { sections: &sections, nginx: &nginx, ..Setup::default() });
    let running = Running::start(&lab);
    let prometheus = running.asked;
    let site = Site {
        host: &lab.host,
        ingress: lab.ingress,
        agent: lab.metrics,
        prometheus,
        put: &|key, value| lab.put(key, value),
        del: &|key| lab.del(key),
        image: &|version| lab.image(version),
        user: &user_line(),
    };
    let began = now();
    let mut seen = BTreeSet::new();

    // Ordinary deploys, under load.
    let registry = Registry::start(&lab);
    registry.push(&lab, "v1");
    site.deploy("shop", "apps/shop/spec", &site.socket_spec(&registry.name("v1"), "shop.test"));
    site.deploy("api", "apps/api/spec", &site.port_spec(&lab.image("v1"), "api.test", "10s"));
    let load = Load::start(lab.ingress, "shop.test", mixed(Duration::from_millis(5)));
    until("requests flow", || load.requests() > 50);
    site.deploy("shop", "apps/shop/image", &lab.image("v2"));
    site.deploy("shop", "env/shop/GREETING", "hello");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    site.deploy("api", "apps/api/image", &lab.image("v2"));
    site.scraped("sum(demae_convergence_seconds_count)", 5.0);
    until("all is well", || prometheus.value("demae_oldest_change_seconds") == Some(0.0));
    assert_eq!(prometheus.fired(began, now()), [] as [&str; 0], "no alert fires in an ordinary deploy");

    mishaps::block(&site);
    seen.extend(exported(&lab));
    mishaps::drift(&site, "shop", "shop.test");
    mishaps::cut(&site, "api", "api.test", || seen.extend(exported(&lab)));
    mishaps::mend(&site);

    let documented = documented();
    let undocumented: Vec<_> = seen.difference(&documented).collect();
    assert!(undocumented.is_empty(), "not in docs/metrics.md: {undocumented:?}");
    let never: Vec<_> = documented.difference(&seen).collect();
    assert!(never.is_empty(), "in docs/metrics.md, and never there: {never:?}");

    let values = dashboards::values(INSTANCE, &["shop", "sick", "api"], "15s");
    let unanswered = prometheus.unanswered(&questions(&root("dashboards")), &values, began, now());
    assert!(unanswered.is_empty(), "{}", unanswered.join("\n"));
}

#[test]
fn the_rules_are_what_prometheus_takes_and_their_tests_pass() {
    for args in [["check", "rules", "demae.yml"], ["test", "rules", "demae.test.yml"]] {
        let output = Command::new("promtool").args(args).current_dir(root("dashboards/rules")).output();
        let output = output.expect("promtool runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "promtool {}: {text}", args.join(" "));
    }
}

#[test]
fn each_alert_has_a_runbook_and_each_runbook_an_alert() {
    let rules = fs::read_to_string(root("dashboards/rules/demae.yml")).expect("rules");
    let alerts: BTreeSet<&str> =
        rules.lines().filter_map(|l| l.trim().trim_start_matches("- ").strip_prefix("alert: ")).collect();
    let runbooks = fs::read_to_string(root("docs/runbooks.md")).expect("docs/runbooks.md");
    let sections: BTreeSet<&str> =
        runbooks.lines().filter_map(|l| l.strip_prefix("## Demae").map(|_| &l[3..])).collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    assert_eq!(alerts, sections);
}

#[test]
fn queries_and_rules_use_no_metric_that_is_not_documented() {
    let documented = documented();
    let rules = fs::read_to_string(root("dashboards/rules/demae.yml")).expect("rules");
    let mut texts: Vec<(String, String)> =
        questions(&root("dashboards")).into_iter().map(|q| (q.place, q.text)).collect();
    texts.push(("rules".to_owned(), rules));
    let mut unknown = BTreeSet::new();
    for (place, text) in texts {
        for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|w| w.starts_with("demae_")) {
            // Recording rules have names of their own, which say what they are made from.
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
            if !documented.contains(word) && !documented.contains(base) {
                unknown.insert(format!("{place}: {word}"));
            }
        }
    }
    assert!(unknown.is_empty(), "{unknown:#?}");
}
