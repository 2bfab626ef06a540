//! Gauges of rollouts: whether this agent leads, and what a leader knows.

use std::collections::BTreeMap;

use super::text::Text;
use crate::model::{fleet::RolloutPhase, name::AppName, time::Timestamp};

/// What an agent knows of the fleet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FleetGauges {
    /// Whether this host takes turns.
    pub enabled: bool,
    /// What it knows if it leads.
    pub leader: Option<LeaderGauges>,
}

/// What a leader knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LeaderGauges {
    /// The phase of each rollout, and since when.
    pub rollouts: BTreeMap<AppName, (RolloutPhase, Timestamp)>,
    /// Turns in which requests have not moved.
    pub tries: usize,
    /// Turns in which they may have.
    pub switches: usize,
    /// Hosts that went away in their turn.
    pub lost: usize,
}

impl FleetGauges {
    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    pub(super) fn write(&self, now: Timestamp, text: &mut Text) {
        let (enabled, leads) = (f64::from(u8::from(self.enabled)), f64::from(u8::from(self.leader.is_some())));
        text.single(
            "demae_rollouts_enabled",
            "gauge",
            "Whether this host takes turns in rollouts (1) or not (0)",
            enabled,
        );
        text.single("demae_fleet_leads", "gauge", "Whether this agent leads the fleet (1) or not (0)", leads);
        let nothing = LeaderGauges::default();
        let leader = self.leader.as_ref().unwrap_or(&nothing);
        text.family("demae_rollout_phase", "gauge", "The phase of the last rollout of an app; only from the leader");
        for (app, (phase, _)) in &leader.rollouts {
            text.series("demae_rollout_phase", &[("app", app.as_str()), ("phase", phase.as_str())], 1.0);
        }
        let name = "demae_rollout_phase_seconds";
        text.family(name, "gauge", "Time since the rollout of an app changed its phase; only from the leader");
        for (app, (_, since)) in &leader.rollouts {
            text.series(name, &[("app", app.as_str())], now.since(*since).as_secs_f64());
        }
        text.family(
            "demae_rollout_turns",
            "gauge",
            "Hosts that have a turn, by how far they may go; 0 except from the leader",
        );
        text.series("demae_rollout_turns", &[("phase", "try")], leader.tries as f64);
        text.series("demae_rollout_turns", &[("phase", "switch")], leader.switches as f64);
        text.single(
            "demae_rollout_lost_hosts",
            "gauge",
            "Hosts that went away in their turn and have not come back; 0 except from the leader",
            leader.lost as f64,
        );
    }
}
