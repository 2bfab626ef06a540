//! The brake: how many apps may leave a host at once.

/// The limits of a mass removal. Both must be exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Brake {
    /// Apps.
    pub apps: usize,
    /// Share of the apps that are placed on this host, in percent.
    pub percent: usize,
}

impl Default for Brake {
    fn default() -> Self {
        Self { apps: 3, percent: 50 }
    }
}

impl Brake {
    /// True if `count` of `placed` apps are more than may leave.
    pub(super) fn is_exceeded(self, count: usize, placed: usize) -> bool {
        count > self.apps && count * 100 > placed * self.percent
    }
}
