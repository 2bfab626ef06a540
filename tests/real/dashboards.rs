//! A real Prometheus scrapes a real agent through deploys and faults. Then every metric is documented and every
//! documented one was exported, every query of every dashboard had data, and no alert fired wrongly.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use crate::support::{
    dashboards::{self, now, questions},
    lab::{Lab, Setup, user_line},
    load::{Load, get, mixed},
    mishaps::{self, Site},
    names::free_address,
    prometheus::{INSTANCE, Running},
    receiver::Receiver,
    registry::Registry,
    wait::until,
};

fn root(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Type and labels of metrics, by name.
type Forms = BTreeMap<String, (String, BTreeSet<String>)>;

/// The metrics in the tables of docs/metrics.md.
fn documented() -> Forms {
    let text = fs::read_to_string(root("docs/metrics.md")).expect("docs/metrics.md");
    let mut found = Forms::new();
    for line in text.lines().filter(|l| l.starts_with("| `")) {
        let cells: Vec<&str> = line.split(" | ").collect();
        let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
        let kind = cells[1].split(',').next().unwrap_or_default().trim().to_owned();
        let labels: BTreeSet<String> = quoted(cells[1]).into_iter().collect();
        for name in quoted(cells[0]).into_iter().filter(|n| n.starts_with("demae_") || n.starts_with("process_")) {
            found.insert(name, (kind.clone(), labels.clone()));
        }
    }
    found
}

/// The metrics that the agent exports now; `promtool check metrics` must accept them.
fn exported(lab: &Lab) -> Forms {
    let (_, text) = get(lab.metrics, "localhost", "/metrics").expect("metrics");
    let mut check =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).spawn().expect("promtool");
    check.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("it is written");
    assert!(check.wait().expect("promtool ends").success(), "promtool check metrics");
    let mut found = Forms::new();
    let mut last = String::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) {
            last = name.to_owned();
            found.insert(last.clone(), (kind.to_owned(), BTreeSet::new()));
        } else if let Some((labels, _)) = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')) {
            let names = labels.split("\",").filter_map(|pair| pair.split_once('=')).map(|(name, _)| name.to_owned());
            let known = &mut found.get_mut(&last).expect("a type comes before its series").1;
            known.extend(names.filter(|n| n != "le"));
        }
    }
    found
}

#[test]
fn every_exported_metric_is_documented_and_every_query_has_data() {
    let receiver = Receiver::start(|_| 204);
    let sections = format!("[webhook]\nurl = \"http://{}/\"\n", receiver.address);
    let certificate = root("tests/golden/certificate.pem");
    let nginx = format!("certificates = [\"{}\"]", certificate.display());
    let lab = Lab::with(&Setup { sections: &sections, nginx: &nginx, ..Setup::default() });
    let running = Running::start(&lab);
    let prometheus = running.client;
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
    let mut seen = Forms::new();

    // Ordinary deploys, under load.
    let registry = Registry::start(free_address(), lab.dir.path());
    registry.push(&lab.image("v1"), "v1");
    site.deploy("shop", "apps/shop/spec", &site.socket_spec(&registry.name("v1"), "shop.test"));
    site.deploy("api", "apps/api/spec", &site.port_spec(&lab.image("v1"), "api.test", "10s"));
    let load = Load::start(lab.ingress, "shop.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    site.deploy("shop", "apps/shop/image", &lab.image("v2"));
    site.deploy("shop", "env/shop/GREETING", "hello");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    site.deploy("api", "apps/api/image", &lab.image("v2"));
    site.scraped("sum(demae_convergence_seconds_count)", 5.0);
    until("no change is pending", || prometheus.value("demae_oldest_change_seconds") == Some(0.0));
    assert_eq!(prometheus.fired(began, now()), [] as [&str; 0], "no alert fires in an ordinary deploy");
    // Nor is one pending.
    until("no alert is pending after it", || prometheus.alerts("pending").is_empty());

    mishaps::block(&site);
    seen.extend(exported(&lab));
    mishaps::drift(&site, "shop", "shop.test");
    mishaps::cut(&site, "api", "api.test", || seen.extend(exported(&lab)));
    mishaps::mend(&site);

    let documented = documented();
    let undocumented: Vec<_> = seen.keys().filter(|name| !documented.contains_key(*name)).collect();
    assert!(undocumented.is_empty(), "not in docs/metrics.md: {undocumented:?}");
    let never: Vec<_> = documented.keys().filter(|name| !seen.contains_key(*name)).collect();
    assert!(never.is_empty(), "in docs/metrics.md, and never exported: {never:?}");
    assert_eq!(seen, documented, "types and labels");

    let values = dashboards::values(INSTANCE, &["shop", "sick", "api"], "15s");
    let unanswered = prometheus.unanswered(&questions(&root("dashboards")), &values, began, now());
    assert!(unanswered.is_empty(), "{}", unanswered.join("\n"));
}

#[test]
fn prometheus_rules_are_valid_and_their_tests_pass() {
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
fn queries_and_rules_use_only_documented_metrics() {
    let documented = documented();
    let rules = fs::read_to_string(root("dashboards/rules/demae.yml")).expect("rules");
    let mut texts: Vec<(String, String)> =
        questions(&root("dashboards")).into_iter().map(|q| (q.place, q.text)).collect();
    texts.push(("rules".to_owned(), rules));
    let mut unknown = BTreeSet::new();
    for (place, text) in texts {
        for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|w| w.starts_with("demae_")) {
            // Recording rules have names of their own, derived from their sources.
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
            if !documented.contains_key(word) && !documented.contains_key(base) {
                unknown.insert(format!("{place}: {word}"));
            }
        }
    }
    assert!(unknown.is_empty(), "{unknown:#?}");
}

#[test]
fn every_metric_is_on_a_dashboard_or_in_a_rule() {
    let mut used: String = questions(&root("dashboards")).into_iter().map(|q| q.text + "\n").collect();
    used += &fs::read_to_string(root("dashboards/rules/demae.yml")).expect("rules");
    let unused: Vec<String> =
        documented().into_keys().filter(|name| name.starts_with("demae_") && !used.contains(name.as_str())).collect();
    assert!(unused.is_empty(), "{unused:#?}");
}
