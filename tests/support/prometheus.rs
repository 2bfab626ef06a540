//! A Prometheus with demae's rules that scrapes the agent of a lab.
#![allow(clippy::disallowed_methods, reason = "a test starts programs and writes files of its own")]

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use super::{dashboards::Prometheus, lab::Lab, load, names::free_address, wait::until};

pub struct Running {
    pub client: Prometheus,
    child: Child,
}

/// The host's name in the label `instance`.
pub const INSTANCE: &str = "host1";

impl Running {
    /// Starts it and waits until it has scraped the agent once.
    pub fn start(lab: &Lab) -> Self {
        let address = free_address();
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboards/rules/demae.yml");
        let text = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [\"{}\"]\nscrape_configs:\n\
             - job_name: demae\n  static_configs: [{{targets: [\"{}\"], labels: {{instance: {INSTANCE}}}}}]\n",
            rules.display(),
            lab.metrics
        );
        let config = lab.path("prometheus.yml");
        fs::write(&config, text).expect("a file");
        let log = fs::File::create(lab.path("prometheus.log")).expect("a log");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", lab.path("prometheus").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("prometheus runs");
        let running = Self { client: Prometheus(address), child };
        until("prometheus answers", || load::get(address, "localhost", "/-/ready").is_ok_and(|(code, _)| code == 200));
        until("the agent was scraped", || running.client.value("up{job=\"demae\"}") == Some(1.0));
        running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
