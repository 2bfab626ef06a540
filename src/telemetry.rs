//! Logs: for people on a terminal, JSON otherwise.

use std::io::IsTerminal as _;

use tracing::{Level, Metadata, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer,
    layer::{Context, Filter, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

/// Libraries that print what they send and receive at `debug` and below; an environment is among it. No filter of a
/// user can bring that back.
const TALKATIVE: [&str; 7] = ["bollard", "hyper", "hyper_util", "h2", "tonic", "tower", "rustls"];

struct NoSecrets;

impl<S: Subscriber> Filter<S> for NoSecrets {
    fn enabled(&self, meta: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        let talkative = TALKATIVE
            .iter()
            .any(|t| meta.target().strip_prefix(t).is_some_and(|r| r.is_empty() || r.starts_with("::")));
        !(talkative && *meta.level() > Level::INFO)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        None
    }
}

/// Starts logging to standard error by a filter such as `info` or `demae=debug`.
///
/// # Errors
/// If the filter cannot be read, or logging has been started already.
pub fn start(filter: &str) -> Result<(), String> {
    let chosen = EnvFilter::try_new(filter)
        .map_err(|e| format!("`{filter}` is not a log filter: {e}; write it like `info` or `demae=debug`"))?;
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = if std::io::stderr().is_terminal() {
        format.with_target(false).compact().boxed()
    } else {
        format.json().flatten_event(true).with_current_span(false).boxed()
    };
    use tracing_subscriber::filter::FilterExt as _;
    tracing_subscriber::registry().with(layer.with_filter(chosen.and(NoSecrets))).try_init().map_err(|e| e.to_string())
}
