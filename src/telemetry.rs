//! Logging: human-readable on a terminal, JSON otherwise. Each deploy is a tree of spans, so every line of a step names
//! its deploy. With the feature `otel` the same spans can be exported.

use std::io::IsTerminal as _;

use tracing::{Level, Metadata, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::FilterExt as _,
    layer::{Context, Filter, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

/// Libraries that log what they send and receive at `debug` and below, environments included. No user filter can enable
/// that.
const LEAKY_TARGETS: [&str; 7] = ["bollard", "hyper", "hyper_util", "h2", "tonic", "tower", "rustls"];

struct NoSecrets;

impl<S: Subscriber> Filter<S> for NoSecrets {
    fn enabled(&self, meta: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        let leaky = LEAKY_TARGETS
            .iter()
            .any(|t| meta.target().strip_prefix(t).is_some_and(|r| r.is_empty() || r.starts_with("::")));
        !(leaky && *meta.level() > Level::INFO)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        None
    }
}

/// Guard of the logging setup. Pending spans are exported when it is dropped.
#[must_use = "spans are exported until this is dropped"]
pub struct Telemetry {
    #[cfg(feature = "otel")]
    exporter: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

#[cfg(feature = "otel")]
impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(exporter) = &self.exporter
            && let Err(e) = exporter.shutdown()
        {
            tracing::warn!("the last spans could not be exported: {e}");
        }
    }
}

/// Starts logging to standard error by a filter such as `info` or `demae=debug`.
///
/// # Errors
/// If the filter cannot be read, logging has been started already, or the exporter of spans cannot be made.
pub fn start(filter: &str) -> Result<Telemetry, String> {
    let chosen = EnvFilter::try_new(filter)
        .map_err(|e| format!("`{filter}` is not a log filter: {e}; write it like `info` or `demae=debug`"))?;
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = if std::io::stderr().is_terminal() {
        format.with_target(false).compact().boxed()
    } else {
        format.json().flatten_event(true).with_current_span(false).boxed()
    };
    let logs = tracing_subscriber::registry().with(layer.with_filter(chosen.and(NoSecrets)));
    #[cfg(feature = "otel")]
    {
        let exporter = otel::exporter()?;
        let spans = exporter.as_ref().map(otel::layer);
        logs.with(spans).try_init().map_err(|e| e.to_string())?;
        Ok(Telemetry { exporter })
    }
    #[cfg(not(feature = "otel"))]
    {
        logs.try_init().map_err(|e| e.to_string())?;
        Ok(Telemetry {})
    }
}

/// The export of spans by OTLP over gRPC.
#[cfg(feature = "otel")]
mod otel {
    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
    use tracing::Subscriber;
    use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

    /// OpenTelemetry's own variable for the receiver of spans.
    const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

    /// The exporter; `None` if no endpoint is set.
    pub(super) fn exporter() -> Result<Option<SdkTracerProvider>, String> {
        if std::env::var_os(ENDPOINT).is_none_or(|v| v.is_empty()) {
            return Ok(None);
        }
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .build()
            .map_err(|e| format!("`{ENDPOINT}`: {e}; write it like `http://127.0.0.1:4317`"))?;
        let named = std::env::var_os("OTEL_SERVICE_NAME").is_some();
        let resource = Resource::builder();
        let resource = if named { resource } else { resource.with_service_name("demae") }.build();
        Ok(Some(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build()))
    }

    /// Exports demae's own spans only: those of libraries may hold what they send.
    pub(super) fn layer<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let spans = tracing_opentelemetry::layer().with_tracer(provider.tracer("demae"));
        spans.with_filter(Targets::new().with_target("demae", tracing::Level::INFO))
    }
}
