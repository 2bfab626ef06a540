//! Paired figures of one run, and what they say.

use std::{collections::BTreeMap, fmt, time::Duration};

/// Milliseconds by column; the entries of one index were measured in the same round.
#[derive(Debug, Default, Clone)]
pub struct Figures(BTreeMap<&'static str, Vec<f64>>);

/// The median of paired figures, and the 95 % bootstrap interval of that median.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} [{:.2}, {:.2}]", self.median, self.low, self.high)
    }
}

impl Figures {
    pub fn push(&mut self, column: &'static str, took: Duration) {
        self.0.entry(column).or_default().push(took.as_secs_f64() * 1000.0);
    }

    pub fn of(&self, column: &str) -> &[f64] {
        self.0.get(column).map_or(&[], Vec::as_slice)
    }

    /// How many milliseconds longer a column took than another in the same round.
    pub fn difference(&self, column: &str, base: &str) -> Interval {
        interval(&self.pairs(column, base).map(|(figure, base)| figure - base).collect::<Vec<_>>())
    }

    /// How many times as long a column took as another in the same round.
    pub fn ratio(&self, column: &str, base: &str) -> Interval {
        interval(&self.pairs(column, base).map(|(figure, base)| figure / base).collect::<Vec<_>>())
    }

    fn pairs(&self, column: &str, base: &str) -> impl Iterator<Item = (f64, f64)> {
        self.of(column).iter().copied().zip(self.of(base).iter().copied())
    }

    /// A table of all columns against one of them.
    pub fn table(&self, base: &str) -> String {
        let line = |(column, figures): (&&'static str, &Vec<f64>)| {
            let (ratio, difference) = (self.ratio(column, base), self.difference(column, base));
            format!(
                "  {column:16} {:7.1} ms   × {ratio}   {:+.1} ms [{:+.1}, {:+.1}]\n",
                median(figures),
                difference.median,
                difference.low,
                difference.high
            )
        };
        self.0.iter().map(line).collect()
    }
}

/// The middle of some figures; NaN if there are none.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The resampling is seeded, so that one set of figures has one verdict.
pub(super) fn interval(figures: &[f64]) -> Interval {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        // xorshift64, Marsaglia 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 33).unwrap_or(0)
    };
    if figures.is_empty() {
        return Interval { low: f64::NAN, median: f64::NAN, high: f64::NAN };
    }
    let resampled = |_| median(&figures.iter().map(|_| figures[next() % figures.len()]).collect::<Vec<_>>());
    let mut medians: Vec<f64> = (0..2000).map(resampled).collect();
    medians.sort_by(f64::total_cmp);
    Interval { low: medians[50], median: median(figures), high: medians[1949] }
}
