//! `deploy.update_config`: how a release goes over the hosts of a fleet.

use std::time::Duration;

/// How long a release must serve on a host of several before it counts as proven, unless the spec says.
pub const MONITOR: Duration = Duration::from_secs(10);

/// How a release goes over the hosts of a fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// On how many hosts at a time; 0 hosts: no limit, and no turns.
    pub parallelism: Amount,
    /// How long it must serve on a host; `None`: see [`Update::monitor`].
    pub monitor: Option<Duration>,
    /// Which part of the hosts may fail before the rollout stops, in thousandths.
    pub max_failures: u16,
    /// What happens then.
    pub on_failure: FailureAction,
    /// Hosts that go first, and wait for a promotion.
    pub canary: u16,
    /// How long after the last canary the release is promoted by itself; `None`: never.
    pub auto_promote_after: Option<Duration>,
}

impl Default for Update {
    fn default() -> Self {
        Self {
            parallelism: Amount::Percent(25),
            monitor: None,
            max_failures: 0,
            on_failure: FailureAction::Rollback,
            canary: 0,
            auto_promote_after: None,
        }
    }
}

impl Update {
    /// How long a release must serve on each of so many hosts. Unless the spec says, that is at least [`MONITOR`], and
    /// long enough for its health checks to notice a failure, which takes `detection`; on one host alone it is not
    /// monitored.
    pub fn monitor(&self, hosts: usize, detection: Duration) -> Duration {
        self.monitor.unwrap_or(if hosts > 1 { MONITOR.max(detection) } else { Duration::ZERO })
    }

    /// How many of so many hosts may fail.
    pub fn allowed_failures(&self, hosts: usize) -> usize {
        hosts * usize::from(self.max_failures) / 1000
    }

    /// Whether hosts take turns.
    pub fn is_paced(&self) -> bool {
        self.parallelism != Amount::Hosts(0)
    }
}

/// A number of hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// So many.
    Hosts(u32),
    /// This part of them, but at least one.
    Percent(u8),
}

impl Amount {
    /// Reads `3` or `25%`.
    ///
    /// # Errors
    /// One sentence that shows how to write it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let error = || format!("`{text}` is not a number of hosts; write it like `2` or `25%`");
        match text.strip_suffix('%') {
            Some(percent) => match percent.trim().parse() {
                Ok(percent @ 1..=100) => Ok(Self::Percent(percent)),
                _ => Err(error()),
            },
            None => match text.parse() {
                Ok(hosts @ 0..=100_000) => Ok(Self::Hosts(hosts)),
                _ => Err(error()),
            },
        }
    }

    /// How many of so many hosts.
    pub fn of(self, hosts: usize) -> usize {
        match self {
            Self::Hosts(n) => usize::try_from(n).unwrap_or(usize::MAX),
            Self::Percent(percent) => (hosts * usize::from(percent) / 100).max(1),
        }
    }
}

/// What happens to a rollout of which too many hosts failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureAction {
    /// Hosts go back to the release before.
    Rollback,
    /// Hosts stay where they are.
    Pause,
}

/// Reads a ratio from 0 to 1, in thousandths.
///
/// # Errors
/// One sentence that shows how to write it.
pub fn ratio(text: &str) -> Result<u16, String> {
    let error = || format!("`{text}` is not a ratio; write it like `0.1`, from 0 to 1");
    let ratio: f64 = text.parse().map_err(|_| error())?;
    if !(0.0..=1.0).contains(&ratio) {
        return Err(error());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range just above")]
    let thousandths = (ratio * 1000.0).round() as u16;
    Ok(thousandths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_numbers_or_percents_of_at_least_one_host() {
        assert_eq!(Amount::parse("25%").map(|a| [a.of(1), a.of(12), a.of(500)]), Ok([1, 3, 125]));
        assert_eq!(Amount::parse("3").map(|a| a.of(500)), Ok(3));
        for bad in ["0%", "101%", "-1", "two", "1.5", "", "%"] {
            assert!(Amount::parse(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn ratios_are_parts_of_all_hosts_rounded_down() {
        let update = |text| Update { max_failures: ratio(text).expect("a ratio"), ..Update::default() };
        assert_eq!([update("0.1").allowed_failures(9), update("0.1").allowed_failures(12)], [0, 1]);
        assert!(ratio("1.1").is_err() && ratio("NaN").is_err() && ratio("-0.1").is_err());
    }
}
