//! The queries of `dashboards/*.json`, run on a Prometheus: each must parse, and each must have had data.

use std::{collections::BTreeMap, fs, net::SocketAddr, path::Path};

use demae::model::time::Timestamp;
use serde_json::Value;

use super::load;

/// A query of a dashboard.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    /// The file, and the panel, variable or annotation.
    pub place: String,
    /// The query, with Grafana's variables.
    pub text: String,
}

/// Every query of every dashboard in a directory.
pub fn questions(dir: &Path) -> Vec<Question> {
    let mut found = Vec::new();
    let mut files: Vec<_> = fs::read_dir(dir).expect("dashboards").map(|f| f.expect("a file").path()).collect();
    files.sort();
    for file in files.into_iter().filter(|f| f.extension().is_some_and(|e| e == "json")) {
        let text = fs::read_to_string(&file).expect("a dashboard");
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut add = |what: &str, text: &Value| {
            if let Some(text) = text.as_str() {
                found.push(Question { place: format!("{name}: {what}"), text: text.to_owned() });
            }
        };
        for variable in list(&json["templating"]["list"]).filter(|v| v["type"] == "query") {
            let query = &variable["query"];
            let query = if query.is_string() { query } else { &query["query"] };
            assert!(query.is_string(), "{name}: variable {} has a query", variable["name"]);
            add(&format!("variable {}", variable["name"]), query);
        }
        for annotation in list(&json["annotations"]["list"]) {
            add(&format!("annotation {}", annotation["name"]), &annotation["expr"]);
        }
        for panel in list(&json["panels"]).flat_map(|p| std::iter::once(p).chain(list(&p["panels"]))) {
            for target in list(&panel["targets"]) {
                assert!(target["expr"].is_string(), "{name}: each target of {} has an expression", panel["title"]);
                add(&format!("panel {}", panel["title"]), &target["expr"]);
            }
        }
    }
    found.sort();
    found.dedup();
    assert!(found.len() > 50, "the dashboards were found");
    found
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Values for Grafana's variables: of this host, for any of these apps, with rates over this time.
pub fn values(instance: &str, apps: &[&str], rate: &str) -> BTreeMap<&'static str, Vec<String>> {
    let one = |value: &str| vec![value.to_owned()];
    BTreeMap::from([
        ("__interval", one("5s")),
        ("__range", one("15m")),
        ("__rate_interval", one(rate)),
        ("app", apps.iter().map(|a| (*a).to_owned()).collect()),
        ("instance", one(instance)),
        ("prefix", one("/demae")),
    ])
}

/// Seconds since 1970.
pub fn now() -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of this century")]
    let millis = Timestamp::now().as_millis() as f64;
    millis / 1000.0
}

/// A Prometheus that answers.
#[derive(Debug, Clone, Copy)]
pub struct Prometheus(pub SocketAddr);

impl Prometheus {
    /// Calls its HTTP API; the error is Prometheus' own text.
    pub fn api(&self, path: &str, parameters: &[(&str, &str)]) -> Result<Value, String> {
        let query: Vec<String> = parameters.iter().map(|(k, v)| format!("{k}={}", encoded(v))).collect();
        let (_, body) = load::get(self.0, "localhost", &format!("/api/v1/{path}?{}", query.join("&")))?;
        let json: Value = serde_json::from_str(&body).map_err(|e| format!("{e}: {body:.200}"))?;
        if json["status"] == "success" { Ok(json["data"].clone()) } else { Err(json["error"].to_string()) }
    }

    /// The value of an expression now, if it has one; the first of several.
    pub fn value(&self, expression: &str) -> Option<f64> {
        let data = self.api("query", &[("query", expression)]).ok()?;
        let value = &data["result"].as_array()?.first()?["value"][1];
        value.as_str()?.parse().ok()
    }

    /// How many series an expression has, or had within these times.
    pub fn series(&self, expression: &str, from: f64, to: f64) -> Result<usize, String> {
        // Prometheus gives at most 11,000 points of a series.
        let step = ((to - from) / 1000.0).max(1.0);
        let times = [from, to, step].map(|t| format!("{t:.3}"));
        let parameters = [("query", expression), ("start", &times[0]), ("end", &times[1]), ("step", &times[2])];
        let data = self.api("query_range", &parameters)?;
        let has_value = |series: &&Value| list(&series["values"]).any(|v| v[1] != "NaN");
        Ok(list(&data["result"]).filter(has_value).count())
    }

    /// Names of alerts that fire now.
    pub fn firing(&self) -> Vec<String> {
        self.alerts("firing")
    }

    /// Names of alerts that are in a state now: `pending` or `firing`.
    pub fn alerts(&self, state: &str) -> Vec<String> {
        let data = self.api("alerts", &[]).expect("alerts");
        let found = list(&data["alerts"]).filter(|a| a["state"] == state);
        found.filter_map(|a| a["labels"]["alertname"].as_str().map(str::to_owned)).collect()
    }

    /// Names of alerts that fired at any moment between these times.
    pub fn fired(&self, from: f64, to: f64) -> Vec<String> {
        let times = [from, to].map(|t| format!("{t:.3}"));
        let query = "ALERTS{alertstate=\"firing\"}";
        let parameters = [("query", query), ("start", &times[0]), ("end", &times[1]), ("step", "1")];
        let data = self.api("query_range", &parameters).expect("alerts");
        list(&data["result"]).filter_map(|s| s["metric"]["alertname"].as_str().map(str::to_owned)).collect()
    }

    /// Runs all queries; returns those that were rejected or had no data between these times. `values` are those of
    /// Grafana's variables, several where one of them is enough.
    pub fn unanswered(
        &self,
        questions: &[Question],
        values: &BTreeMap<&'static str, Vec<String>>,
        from: f64,
        to: f64,
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        for question in questions {
            let mut last = String::new();
            let answered = variants(&question.text, values).into_iter().any(|text| {
                let series = match text.strip_prefix("label_values(") {
                    Some(rest) => self.label_values(rest.trim_end_matches(')'), from, to),
                    None => self.series(&text, from, to),
                };
                last = match &series {
                    Ok(_) => format!("no data: {text}"),
                    Err(e) => format!("{e}: {text}"),
                };
                series.is_ok_and(|n| n > 0)
            });
            if !answered {
                wrong.push(format!("{}: {last}", question.place));
            }
        }
        wrong
    }

    /// `label_values(metric, label)`, as Grafana evaluates it.
    fn label_values(&self, arguments: &str, from: f64, to: f64) -> Result<usize, String> {
        let (selector, label) = arguments.rsplit_once(',').ok_or("no label is named")?;
        let times = [from, to].map(|t| format!("{t:.3}"));
        let parameters = [("match[]", selector.trim()), ("start", &times[0]), ("end", &times[1])];
        let data = self.api("series", &parameters)?;
        Ok(list(&data).filter(|s| s[label.trim()].is_string()).count())
    }
}

/// A query with the values of Grafana's variables filled in; one for each combination.
fn variants(text: &str, values: &BTreeMap<&'static str, Vec<String>>) -> Vec<String> {
    let mut found = vec![text.to_owned()];
    // The longest name first: `$__rate_interval` begins with `$__rate`.
    for (name, values) in values.iter().rev() {
        let (plain, braced) = (format!("${name}"), format!("${{{name}}}"));
        found = found
            .into_iter()
            .flat_map(|text| {
                let known = text.contains(&plain) || text.contains(&braced);
                let values = if known { values.as_slice() } else { &values[..1] };
                values.iter().map(|v| text.replace(&braced, v).replace(&plain, v)).collect::<Vec<_>>()
            })
            .collect();
    }
    found
}

fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
