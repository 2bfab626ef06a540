//! What comes to its end without anybody changing anything: disk, ports, certificates.

use prometheus::proto::MetricFamily;

use super::family::Family;
use crate::model::time::Timestamp;

/// A directory's file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// What the directory is for: a bounded set.
    pub dir: &'static str,
    /// Bytes that this agent may still write.
    pub free: u64,
    /// Bytes in all.
    pub size: u64,
}

/// What was last seen of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Vitals {
    /// File systems.
    pub disks: Vec<Disk>,
    /// Certificates by file, and when they expire.
    pub certificates: Vec<(String, Timestamp)>,
    /// Loopback ports in use or at rest, and of how many.
    pub ports: (usize, usize),
}

impl Vitals {
    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    pub(super) fn families(&self) -> Vec<MetricFamily> {
        let mut free = Family::gauge("demae_disk_free_bytes", "Bytes that may still be written, by directory");
        let mut size = Family::gauge("demae_disk_size_bytes", "Size of the file system, by directory");
        for disk in &self.disks {
            free.add(&[("dir", disk.dir)], disk.free as f64);
            size.add(&[("dir", disk.dir)], disk.size as f64);
        }
        let mut expiry = Family::gauge(
            "demae_certificate_expiry_timestamp_seconds",
            "When certificates expire that nginx serves for apps, or that etcd is reached with, by file",
        );
        for (file, at) in &self.certificates {
            expiry.add(&[("file", file)], at.as_millis() as f64 / 1000.0);
        }
        let (used, all) = self.ports;
        let ports = Family::gauge("demae_ports", "Loopback ports for apps: in use or at rest, and free")
            .with(&[("state", "used")], used as f64)
            .with(&[("state", "free")], all.saturating_sub(used) as f64);
        vec![free.done(), size.done(), expiry.done(), ports.done()]
    }
}
