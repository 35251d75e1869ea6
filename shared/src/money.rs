//! Money, in integer micro-dollars: sums are exact, and no rounding happens between the ledger and the budget.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};

/// An amount in millionths of a US dollar. In JSON it is a number of dollars with at most six decimals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, sqlx::Type)]
#[sqlx(transparent)]
pub struct MicroUsd(pub i64);

impl MicroUsd {
    /// Zero.
    pub const ZERO: Self = Self(0);

    /// From dollars, rounded to the nearest millionth. `None` if not finite or beyond ±9 billion.
    pub fn from_usd(usd: f64) -> Option<Self> {
        let micros = (usd * 1e6).round();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the range is checked on the same line"
        )]
        (micros.abs() <= 9e15).then_some(Self(micros as i64))
    }

    /// Dollars as a number of at most six decimals. `None` for more, and where [`MicroUsd::from_usd`] gives none.
    pub fn exact(usd: f64) -> Option<Self> {
        // A number of six decimals comes back as it was.
        #[expect(clippy::float_cmp, reason = "the same number, not one that is near")]
        Self::from_usd(usd).filter(|amount| amount.usd() == usd)
    }

    /// In dollars, for JSON and for people. Exact to the millionth up to nine billion dollars.
    #[expect(clippy::cast_precision_loss, reason = "amounts stay below 2^53 millionths")]
    pub fn usd(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// Whether this is at least `percent` percent of `whole`.
    pub fn reaches(self, percent: i64, whole: Self) -> bool {
        i128::from(self.0) * 100 >= i128::from(percent) * i128::from(whole.0)
    }

    /// The smaller of the two amounts.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self(self.0.min(other.0))
    }
}

impl Add for MicroUsd {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for MicroUsd {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl AddAssign for MicroUsd {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for MicroUsd {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, Add::add)
    }
}

/// `$0.0123`: at least two decimals, and no more than needed.
impl fmt::Display for MicroUsd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, micros) = (if self.0 < 0 { "-" } else { "" }, self.0.unsigned_abs());
        let decimals = format!("{:06}", micros % 1_000_000);
        let kept = decimals.trim_end_matches('0').len().max(2);
        write!(f, "{sign}${}.{}", micros / 1_000_000, &decimals[..kept])
    }
}

impl Serialize for MicroUsd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.usd())
    }
}

impl<'de> Deserialize<'de> for MicroUsd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let usd = f64::deserialize(deserializer)?;
        Self::from_usd(usd).ok_or_else(|| serde::de::Error::custom("not an amount of money"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_written_with_two_to_six_decimals() {
        for (micros, text) in [
            (0, "$0.00"),
            (1, "$0.000001"),
            (1_250_000, "$1.25"),
            (-50_000, "-$0.05"),
            (50_120_000, "$50.12"),
        ] {
            assert_eq!(MicroUsd(micros).to_string(), text);
        }
    }

    #[test]
    fn a_number_of_dollars_survives_the_wire_to_the_millionth() {
        for micros in [0, 1, 999_999, 1_000_001, 123_456_789_012] {
            let text = serde_json::to_string(&MicroUsd(micros)).unwrap();
            assert_eq!(
                serde_json::from_str::<MicroUsd>(&text).unwrap(),
                MicroUsd(micros),
                "{text}"
            );
        }
        assert_eq!(MicroUsd::from_usd(f64::NAN), None);
        assert_eq!(MicroUsd::from_usd(1e300), None);
    }
}
