//! Gauges of resources that run out by themselves: disk, ports, certificates.

use super::text::Text;
use crate::model::time::Timestamp;

/// A directory's file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The purpose of the directory: a bounded set.
    pub dir: &'static str,
    /// Bytes available to this agent.
    pub free: u64,
    /// Total bytes.
    pub size: u64,
}

/// The last reading of this machine's resources.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostGauges {
    /// File systems.
    pub disks: Vec<Disk>,
    /// Certificates by file, and when they expire.
    pub certificates: Vec<(String, Timestamp)>,
    /// Loopback ports in use or in quarantine after use, and their total.
    pub ports: (usize, usize),
    /// Whether new TCP apps are routed by the kernel's table.
    pub tcp_routes: bool,
    /// Whether its policy allows nothing, since the file cannot be used.
    pub policy_unusable: bool,
    /// Connections that the kernel tracks, and its limit; `None` if it tracks none.
    pub conntrack: Option<(u64, u64)>,
}

impl HostGauges {
    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    pub(super) fn write(&self, text: &mut Text) {
        text.family("demae_disk_free_bytes", "gauge", "Bytes that may still be written, by directory");
        for disk in &self.disks {
            text.series("demae_disk_free_bytes", &[("dir", disk.dir)], disk.free as f64);
        }
        text.family("demae_disk_size_bytes", "gauge", "Size of the file system, by directory");
        for disk in &self.disks {
            text.series("demae_disk_size_bytes", &[("dir", disk.dir)], disk.size as f64);
        }
        let name = "demae_certificate_expiry_timestamp_seconds";
        let help = "When certificates expire that nginx serves for apps, or that etcd is reached with, by file";
        text.family(name, "gauge", help);
        for (file, at) in &self.certificates {
            text.series(name, &[("file", file)], at.as_millis() as f64 / 1000.0);
        }
        // Tests of the text have no runtime.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            text.family("demae_tasks", "gauge", "Tasks of the agent that have not ended");
            text.series("demae_tasks", &[], runtime.metrics().num_alive_tasks() as f64);
        }
        let (used, all) = self.ports;
        text.family("demae_ports", "gauge", "Loopback ports for apps: in use or at rest, and free");
        text.series("demae_ports", &[("state", "used")], used as f64);
        text.series("demae_ports", &[("state", "free")], all.saturating_sub(used) as f64);
        text.family(
            "demae_tcp_routes",
            "gauge",
            "1 if new TCP apps are routed by the kernel's table, 0 if by published ports",
        );
        text.series("demae_tcp_routes", &[], f64::from(u8::from(self.tcp_routes)));
        let name = "demae_policy_usable";
        text.family(name, "gauge", "0 if the policy of this host cannot be used, so nothing is created; else 1");
        text.series(name, &[], f64::from(u8::from(!self.policy_unusable)));
        if let Some((entries, limit)) = self.conntrack {
            text.family("demae_conntrack_entries", "gauge", "Connections that the kernel tracks");
            text.series("demae_conntrack_entries", &[], entries as f64);
            text.family(
                "demae_conntrack_limit",
                "gauge",
                "Most connections that the kernel tracks; it drops new ones beyond",
            );
            text.series("demae_conntrack_limit", &[], limit as f64);
        }
    }
}
